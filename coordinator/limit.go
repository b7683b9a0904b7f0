package coordinator

import (
	"container/list"
	"math"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/deimos-edge/deimos/wire"
)

// limits bound what one party can ask for, so that there is room for the others.
// They are token buckets; who finds one empty is told when to come back.
//
//   - Enrolment, one address: 50 a second after 200 at once, unless
//     [Config.EnrolRate] says otherwise. A site with a whole
//     fleet behind one address is in within minutes (devices come back by
//     themselves), and a stranger cannot use all there is for everybody. With
//     IPv6 an address is a /64; a household's /56 has the same rate, and a
//     site's /48 up to four times that, but at most half of what there is for all.
//   - Enrolment, all who are not members together: 400 a second after 1000 at
//     once. It costs a signature, a certificate and a few records, about a
//     millisecond of a core: 10,000 devices enrol in half a minute, and orders go
//     on beside it. Only a request with the proof of a key is counted.
//   - Renewals, all together: 800 a second after 2000 at once, which strangers
//     cannot use up; and of one member 1 a second after 20 at once, for whoever
//     has seen a member's request can repeat it.
//   - Failed logins, one address: 10 a second after 1000 at once. Tokens have 256
//     bits and cannot be guessed: this bounds work and log lines. A good token is
//     taken all the same, or anybody behind the same address could lock the
//     operators out.
//   - Calls of one operator: 1000 a second after 5000 at once. Plain uploads and
//     downloads are not counted, their bytes bound them.
//
// They are each coordinator's own: N of them let N times as much through.
type limits struct {
	enrol    *buckets // by address
	enrol56  *buckets // by IPv6 /56
	enrol48  *buckets // by IPv6 /48
	enrolAll *rate.Limiter
	renew    *buckets // by member
	renewAll *rate.Limiter
	logins   *buckets // by address
	calls    *buckets // by operator
}

// maxBuckets is how many parties one limit remembers, about 200 bytes each. The
// one unheard of for longest is forgotten first.
const maxBuckets = 10_000

const (
	enrolRate    = 50
	enrolRateAll = 400
)

// newLimits lets one address enrol perAddress devices a second; 0 is enrolRate.
func newLimits(perAddress int) *limits {
	if perAddress == 0 {
		perAddress = enrolRate
	}
	all := max(perAddress, enrolRateAll)
	perSite := max(perAddress, min(4*perAddress, all/2))
	return &limits{
		enrol:    newBuckets(rate.Limit(perAddress), 4*perAddress),
		enrol56:  newBuckets(rate.Limit(perAddress), 4*perAddress),
		enrol48:  newBuckets(rate.Limit(perSite), perSite*5/2),
		enrolAll: rate.NewLimiter(rate.Limit(all), all*5/2),
		renew:    newBuckets(1, 20),
		renewAll: rate.NewLimiter(rate.Limit(2*all), 2*all*5/2),
		logins:   newBuckets(10, 1000),
		calls:    newBuckets(1000, 5000),
	}
}

// buckets are limiters by party.
type buckets struct {
	each  rate.Limit
	burst int

	mu    sync.Mutex
	of    map[string]*list.Element // of bucket
	order *list.List               // most recently used first
}

type bucketOf struct {
	party string
	*rate.Limiter
}

func newBuckets(each rate.Limit, burst int) *buckets {
	return &buckets{each: each, burst: burst, of: make(map[string]*list.Element), order: list.New()}
}

// take is 0 if party may go on, or else how long it has to wait.
func (b *buckets) take(party string, now time.Time) time.Duration {
	b.mu.Lock()
	e, ok := b.of[party]
	if ok {
		b.order.MoveToFront(e)
	} else {
		e = b.order.PushFront(bucketOf{party, rate.NewLimiter(b.each, b.burst)})
		b.of[party] = e
		if len(b.of) > maxBuckets {
			oldest := b.order.Back()
			delete(b.of, b.order.Remove(oldest).(bucketOf).party)
		}
	}
	b.mu.Unlock()
	return take(e.Value.(bucketOf).Limiter, now)
}

func take(l *rate.Limiter, now time.Time) time.Duration {
	r := l.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now) // it is not waited for
	}
	return wait
}

// slowly refuses for now.
func slowly(w http.ResponseWriter, wait time.Duration, what string) error {
	seconds := int(math.Ceil(wait.Seconds()))
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	return refuse(http.StatusTooManyRequests, "too_many", "%s; try again in %d s", what, seconds)
}

// limitEnrol refuses an enrolment that is one too many from where it comes.
func (c *Coordinator) limitEnrol(w http.ResponseWriter, r *http.Request) error {
	now := c.now()
	wait := c.limits.enrol.take(network(r), now)
	if p, ok := prefix(host(r), 32, 56); wait == 0 && ok && p.Addr().Is6() {
		wait = c.limits.enrol56.take(p.String(), now)
	}
	if p, ok := prefix(host(r), 32, 48); wait == 0 && ok && p.Addr().Is6() {
		wait = c.limits.enrol48.take(p.String(), now)
	}
	if wait > 0 {
		return slowly(w, wait, "too many devices are enrolling from this address")
	}
	return nil
}

// limitProven refuses an enrolment that is one too many of all. The key of id was
// proved. Members have a budget of their own: theirs must not end because
// strangers ask.
func (c *Coordinator) limitProven(w http.ResponseWriter, id wire.DeviceID) error {
	now := c.now()
	if !c.reg.member(id) {
		if wait := take(c.limits.enrolAll, now); wait > 0 {
			return slowly(w, wait, "too many devices are enrolling at once")
		}
		return nil
	}
	if wait := c.limits.renew.take(string(id), now); wait > 0 {
		return slowly(w, wait, "this device's certificate is renewed too often")
	}
	if wait := take(c.limits.renewAll, now); wait > 0 {
		return slowly(w, wait, "too many devices are renewing at once")
	}
	return nil
}

// host is where a request comes from.
func host(r *http.Request) string {
	h, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return h
}

// network is who is behind an address: with IPv6, everybody has a /64 to choose from.
func network(r *http.Request) string {
	if p, ok := prefix(host(r), 32, 64); ok {
		return p.String()
	}
	return host(r)
}

// prefix is the network of an address, with so many bits. ok is false if it is
// no IP address.
func prefix(address string, bits4, bits6 int) (p netip.Prefix, ok bool) {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return p, false
	}
	a = a.Unmap().WithZone("")
	bits := bits6
	if a.Is4() {
		bits = bits4
	}
	p, err = a.Prefix(bits)
	return p, err == nil
}
