package coordinator

import (
	"crypto/sha256"
	"encoding/hex"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A pause of the owner may last as long as the job: it ends no order, and takes no checkpoint.
func TestAPauseEndsNoJobBeforeItsDeadline(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	w.putFile(t, "in", someBytes(100), 1)
	says := ready()
	d.tell(says)
	has, goes := make(chan wire.Order, 8), make(chan bool)
	goOn := sync.OnceFunc(func() { close(goes) })
	defer goOn()
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Running, Code: "paused", At: time.Now()})
		has <- o
		<-goes
		return d.compute(o, nil)
	})
	q := input(w.module(t), "in")
	q.Needs, q.Verify, q.Limits = on(d), api.VerifyNone, wire.JobLimits{WallSeconds: 10}
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	o := next(t, has, "the order")
	row, err := w.jobs.rows.find(testContext(t), j.ID)
	if must(t, err); o.Expires.Sub(row.Spec.Deadline).Abs() > time.Minute {
		t.Errorf("it lives until %s, the job until %s", o.Expires, row.Spec.Deadline)
	}
	paused := *says
	paused.Pause = &wire.Pause{Code: "paused"}
	w.advance(10 * time.Hour)
	d.tell(&paused)
	w.outbox.step(testContext(t))
	if v, err := w.outbox.get(testContext(t), d.id, o.ID); err != nil || v.State.Terminal() {
		t.Fatalf("after ten hours: %s %s %v", v.State, v.Reason, err)
	}
	goOn()
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	task, err := w.jobs.tasks.find(testContext(t), taskKey(j.ID, 0))
	if err != nil || j.State != wire.Succeeded || len(task.Attempts) != 1 {
		t.Errorf("%s %s, %d attempts: %v", j.State, j.Reason, len(task.Attempts), err)
	}
}

// A device that says for ever that it runs a task does not hold it until its deadline.
func TestWhoRunsATaskForEverIsNotWaitedForAlone(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.away = 10 * time.Hour })
	t.Cleanup(w.Close)
	ds := w.devices(t, 5)
	w.putFile(t, "in", someBytes(100), 3)
	has := make(chan bool, 8)
	var hang atomic.Int32
	for _, d := range ds {
		d.tell(ready())
		hangs := sync.OnceValue(func() bool { // as it is asked, and when it is asked again
			first := hang.Add(1) <= 2
			has <- true
			return first
		})
		d.on(wire.KindJobRun, func(o wire.Order) *reply {
			if !hangs() {
				return d.compute(o, nil)
			}
			raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Running, At: time.Now()})
			if err != nil {
				t.Error(err)
			}
			d.mqtt.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, raw) // it may be asked again when the test is over
			return nil
		})
	}
	q := input(w.module(t), "in")
	q.Verify = api.VerifyNone
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	for range 2 { // the second hangs as the first does
		next(t, has, "the task")
		w.advance(jobLife + time.Second)
		for _, d := range ds {
			d.tell(ready())
		}
	}
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	task, err := w.jobs.tasks.find(testContext(t), taskKey(j.ID, 0))
	if err != nil || j.State != wire.Succeeded || len(task.Attempts) != 3 { // one more for each that hangs
		t.Errorf("%s %s, %d attempts: %v", j.State, j.Reason, len(task.Attempts), err)
	}
}

// The list of an input's chunks is there for as long as the job may begin, though the shelf
// forgets all else after a day; that of an order that is over is not put there again.
func TestTheListOfAnOpenOrderIsKept(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	d.on(wire.KindJobRun, silent)
	list := []byte("[]")
	sum := sha256.Sum256(list)
	id := hex.EncodeToString(sum[:])
	submit := func() (name string, o wire.Order) {
		o, err := w.outbox.submit(testContext(t), d.id, wire.KindJobRun, wire.JobRun{Inputs: []wire.JobInput{{Name: "in", List: &wire.Blob{SHA256: id}}}}, maxLife)
		must(t, err)
		name = listName(o.ID, id)
		must(t, w.staging.put(testContext(t), name, list))
		return name, o
	}
	made := func(name string) string {
		v, err := w.staging.bucket.GetInfo(testContext(t), name)
		must(t, err)
		return v.NUID // of these bytes, which the store forgets a day after they came
	}
	name, _ := submit()
	over, o := submit()
	must(t, w.outbox.end(testContext(t), d.id, o.ID, wire.Canceled, wire.CodeCanceled, "it is over"))
	for range 2 {
		first, other := made(name), made(over)
		w.advance(stagingLife / 2)
		eventually(t, "the list is put there anew", func() bool { return made(name) != first })
		if made(over) != other {
			t.Error("so is one that nobody fetches any more")
		}
	}
}

// A device whose deliveries no test looks at does its orders all the same.
func TestADeviceThatNobodyWatchesGoesOn(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	for len(d.orders) < cap(d.orders) {
		passOn(d.orders, wire.Order{})
	}
	for len(d.acks) < cap(d.acks) {
		passOn(d.acks, wire.Ack{})
	}
	for range 3 {
		o, err := w.outbox.submit(testContext(t), d.id, wire.KindPing, struct{}{}, time.Minute)
		must(t, err)
		_, err = w.outbox.await(testContext(t), o, nil)
		must(t, err)
	}
}
