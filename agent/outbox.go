package agent

import (
	"cmp"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// class says how much it would matter if a report were lost.
type class string

// From the least worth to the most.
const (
	classProof   class = "proof"   // worth nothing soon after its deadline
	classReceipt class = "receipt" // what it says can be asked again
	classResult  class = "result"  // may have cost hours to work out
	classControl class = "control" // what this device is: its version, its configuration
)

// retention gives each kind its class. What is not in it, of an extension, is a result.
var retention = map[wire.Kind]class{
	wire.KindAudit:         classProof,
	wire.KindPing:          classProof,
	wire.KindChunkLosses:   classProof,
	wire.KindChunkHoldings: classReceipt,
	wire.KindChunkStore:    classReceipt,
	wire.KindChunkServe:    classReceipt,
	wire.KindChunkDrop:     classReceipt,
	wire.KindJobRun:        classResult,
	wire.KindUpdateInstall: classControl,
	wire.KindConfigApply:   classControl,
	wire.KindOrderCancel:   classControl,
}

func classOf(k wire.Kind) class { return cmp.Or(retention[k], classResult) }

// name is the class as others read it; journals of before have entries without.
func (c class) name() string { return string(cmp.Or(c, classResult)) }

func (c class) worth() int {
	return slices.Index([]class{classProof, classReceipt, classResult, classControl}, class(c.name()))
}

// outbox is what the device owes the coordinator: terminal reports that are not
// acknowledged. It lives in the journal, with those that are, and is bounded in
// bytes. Above the bound, in this order:
//
//  1. Acknowledged reports whose order has expired are forgotten. Nobody asks
//     for them again; see forget.
//  2. Reports are stripped: body and attachment are given up, and the report is
//     sealed anew with [wire.Report.Dropped]. First those that are acknowledged,
//     whose content the coordinator has; then the others, the least valuable
//     class first, and in it the oldest. A report that is to be kept makes no
//     more valuable one suffer: rather it is stripped itself.
//  3. New orders are left unanswered until there is room. The coordinator sends
//     them again.
//
// That an order was done is never forgotten before its expiry, and its state,
// code and reason never, so each order that is begun has bareReport bytes set
// aside. A reason longer than that, and what was begun before the bound was
// lowered, may exceed the bound: exactly once counts for more.
//
// What was not acknowledged when it was stripped is in a durable record by
// class, which goes out with every hello. If the full report had reached the
// coordinator and only its acknowledgement was still on its way, the record
// says too much, never too little. Such a report gets a new number, and the
// acknowledgement of the old one still counts: to the coordinator the first
// terminal report is final, so it has more than it would get.
type outbox struct {
	journal journal
	bound   int64
	id      Identity      // seals what is stripped
	number  func() uint64 // of the next report
	clock   *Clock

	sweeping sync.Mutex // one walk at a time; guards next
	next     time.Time  // no walk before, as the last one found too little
}

const (
	// defaultOutbox bounds the journal, in bytes.
	defaultOutbox = 64 << 20
	// bareReport is what a report without body and attachment takes, with a
	// reason of a few sentences.
	bareReport = 2 << 10
	// sweepPause is between two walks over the journal if the first found too little.
	sweepPause = 30 * time.Second
	// stripBatch is the most reports that are stripped with one sync.
	stripBatch = 32
)

// room tells whether a report of every one of n orders could be kept. Control
// orders may go a sixteenth beyond the bound: they are what helps.
func (b *outbox) room(n int, p int) bool {
	bound := b.bound
	if p <= wire.KindUpdateInstall.Priority() {
		bound += bound / 16
	}
	return b.journal.bytes()+int64(n)*bareReport <= bound
}

// keep makes a terminal report durable, if need be without its body. It returns
// what was kept.
func (b *outbox) keep(e entry) (entry, error) {
	need := kept(e)
	if err := b.sweep(need, e.Class); err != nil {
		return e, err
	}
	if !b.ample(need) && !e.Bare { // the last sixteenth is for what cannot be smaller
		var err error
		if e, err = b.bare(e, e.Seq); err != nil { // the full one was never sent
			return e, err
		}
	}
	return e, b.journal.put(e)
}

// ample tells whether need more bytes leave room for orders to come.
func (b *outbox) ample(need int64) bool { return b.journal.bytes()+need <= b.bound-b.bound/16 }

// kept is about what an entry takes: base64 makes 3 bytes 4.
func kept(e entry) int64 { return int64(len(e.Report))*4/3 + 256 }

// bare is e without its content, under the number seq.
func (b *outbox) bare(e entry, seq uint64) (entry, error) {
	r, err := wire.OpenAs[wire.Report](e.Report, b.id.public(), wire.TypeReport)
	if err != nil {
		return e, fmt.Errorf("the kept report of order %s cannot be read: %w", e.Order, err)
	}
	r.Seq, r.Body, r.Attachment, r.Dropped = seq, nil, nil, true
	raw, err := wire.Seal(b.id.key, wire.TypeReport, r)
	if err != nil {
		return e, err
	}
	e.lost, e.lostAt = int64(len(e.Report)-len(raw)), b.clock.Now().UTC().Truncate(time.Second)
	e.Seq, e.Report, e.Bare = seq, raw, true
	return e, nil
}

// worthStripping is the least content, in bytes, that is worth it: below, a
// stripped report is hardly smaller.
const worthStripping = 64

// content is what a report would lose.
func content(r wire.Report) int {
	n := len(r.Body)
	if r.Attachment != nil {
		n += worthStripping + len(r.Attachment.Inline)
	}
	return n
}

// strip gives up the content of a kept report.
func (b *outbox) strip(e entry) (entry, error) {
	if e.Acked {
		bare, err := b.bare(e, e.Seq)
		bare.lost = 0 // the coordinator has it
		return bare, err
	}
	bare, err := b.bare(e, b.number())
	bare.Was = e.Seq
	return bare, err
}

// sweep makes room for need bytes if they are not ample, and then for a while
// more, as a walk costs the same whatever it finds. It strips nothing that is
// worth more than most. It does not walk if the last walk found too little a
// short time ago.
func (b *outbox) sweep(need int64, most class) error {
	if b.ample(need) {
		return nil
	}
	b.sweeping.Lock()
	defer b.sweeping.Unlock()
	if b.ample(need) || time.Now().Before(b.next) {
		return nil // somebody else has made room, or could not
	}
	if err := forget(b.journal, b.clock); err != nil {
		return fmt.Errorf("the full outbox cannot be tidied: %w", err)
	}
	victims, err := b.victims(most)
	for goal := b.bound - b.bound/8 - need; err == nil && len(victims) > 0 && b.journal.bytes() > goal; {
		var batch []string
		for missing := b.journal.bytes() - goal; missing > 0 && len(batch) < stripBatch && len(batch) < len(victims); {
			missing -= victims[len(batch)].gain
			batch = append(batch, victims[len(batch)].order)
		}
		victims = victims[len(batch):]
		err = b.stripAll(batch)
	}
	if err != nil {
		return fmt.Errorf("the full outbox cannot be tidied: %w", err)
	}
	if !b.ample(need) {
		b.next = time.Now().Add(sweepPause)
	}
	return nil
}

// victim is a report that may be stripped.
type victim struct {
	order string
	rank  int
	gain  int64 // about so many bytes
}

// victims lists the reports that may be stripped, the first to go first.
func (b *outbox) victims(most class) (all []victim, err error) {
	err = b.journal.each(func(e entry) {
		v := victim{order: e.Order, rank: e.Class.worth(), gain: max(kept(e)-bareReport/2, 1)}
		if e.Acked {
			v.rank = -1
		}
		if !e.Bare && v.rank <= most.worth() {
			all = append(all, v)
		}
	})
	slices.SortFunc(all, func(a, b victim) int { return cmp.Or(a.rank-b.rank, cmp.Compare(a.order, b.order)) })
	return all, err
}

func (b *outbox) stripAll(orders []string) error {
	var failed error
	err := b.journal.revise(orders, true, func(e *entry) fate {
		if e.Bare {
			return leave
		}
		bare, err := b.strip(*e)
		if err != nil {
			failed = err
			return leave
		}
		*e = bare
		return replace
	})
	return cmp.Or(err, failed)
}

// acknowledged keeps the note that the coordinator has these reports.
func (b *outbox) acknowledged(reports []wire.Acked) error {
	b.sweeping.Lock()
	b.next = time.Time{} // now there may be something to gain
	b.sweeping.Unlock()
	return acknowledge(b.journal, reports)
}

// debt is a terminal report that the coordinator has not acknowledged. The
// report itself stays in the journal.
type debt struct {
	order string
	next  time.Time // when to send it again, local monotonic clock
	wait  time.Duration
	place int // in the heap
}

const (
	// firstResend leaves the coordinator the time to sync its state before it
	// acknowledges.
	firstResend = 10 * time.Second
	lastResend  = time.Minute
	// resendBurst reports go out at once, and the next after resendGap: the
	// session has room for 256 messages, and drops what is above.
	resendBurst = 64
	resendGap   = 100 * time.Millisecond
)

// debts are ordered by when they are due.
type debts struct {
	of    map[string]*debt // by order id
	queue debtQueue
}

func (d *debts) add(order string, now time.Time) {
	if _, ok := d.of[order]; ok {
		return
	}
	if d.of == nil {
		d.of = map[string]*debt{}
	}
	o := &debt{order: order, next: now.Add(firstResend), wait: firstResend}
	d.of[order] = o
	heap.Push(&d.queue, o)
}

func (d *debts) has(order string) bool { return d.of[order] != nil }

func (d *debts) settle(order string) {
	if o, ok := d.of[order]; ok {
		heap.Remove(&d.queue, o.place)
		delete(d.of, order)
	}
}

// due takes up to resendBurst orders whose report is to be sent now, and puts
// them off, with a growing and jittered wait. It says how long until the next;
// 0 if there is none.
func (d *debts) due(now time.Time) (orders []string, next time.Duration) {
	for len(d.queue) > 0 && len(orders) < resendBurst && !d.queue[0].next.After(now) {
		o := d.queue[0]
		orders = append(orders, o.order)
		o.wait = min(2*o.wait, lastResend)
		o.next = now.Add(o.wait/2 + rand.N(o.wait)) // half to one and a half
		heap.Fix(&d.queue, 0)
	}
	if len(d.queue) == 0 {
		return orders, 0
	}
	return orders, max(d.queue[0].next.Sub(now), resendGap)
}

// allDue makes everything due now.
func (d *debts) allDue(now time.Time) {
	for _, o := range d.queue {
		o.next, o.wait = now, firstResend
	}
}

type debtQueue []*debt

func (q debtQueue) Len() int           { return len(q) }
func (q debtQueue) Less(i, j int) bool { return q[i].next.Before(q[j].next) }
func (q debtQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

func (q *debtQueue) Push(x any) {
	x.(*debt).place = len(*q)
	*q = append(*q, x.(*debt))
}

func (q *debtQueue) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return last
}
