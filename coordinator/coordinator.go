// Package coordinator is the fleet's side of Deimos: it takes devices in and
// sends them away, keeps the orders it gives them until they are answered, tells
// them what to run with, places chunks and jobs, and challenges the devices to
// prove that they did what they signed for.
//
// # Trust
//
// A coordinator can place bytes and sandboxed jobs, nothing more. It cannot
// change firmware: release keys are not here, and the update repository is
// handed out as it was signed elsewhere. Devices believe an order because of
// its signature, never because of who delivered it. A device is believed because
// of its key, whose record says whether it still belongs: broker, data plane and
// renewal ask it each time. An operator is believed because of a token, and may
// what its role may; what it changes is on the audit log before it is done.
//
// # State
//
// All state is in JetStream (package engine): devices and those that wait to be
// one, tokens of fleet and operators (hashed), orders with their signed reports,
// configuration, chunk and object records, challenges, the audit log. The
// folder given as [Config.Dir] holds the secret keys and, with the embedded
// engine, JetStream's files. A second coordinator on the same external NATS,
// with a copy of the keys, is a peer: changes are made by compare-and-set, and
// each has a copy of the records that a watch keeps up to date; of orders, the
// open ones.
//
// # What is called
//
// The HTTP surface is one table of routes (http.go); permissions, audit log and
// OpenAPI description are made from it. Each topic has its routes in its file.
package coordinator

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Config says how a coordinator runs.
type Config struct {
	Dir       string   // keys and state
	Listen    string   // HTTPS address, host:port; port 0 takes a free one
	MQTT      string   // MQTT address, host:port; with NATS set, the port devices find the external listener on
	NATS      string   // URL of an external NATS server; empty: embedded
	Advertise []string // host names or addresses that devices use; empty: the one they enrol by
	CertNames []string // more host names and addresses that the certificate is good for
	// Announce is the name under which the local network is told where this
	// coordinator is; empty: one with the machine's name, "off": none. On a loopback
	// address nothing is announced.
	Announce string
	// PublicMQTT and PublicHTTPS are where devices reach the broker and the data
	// plane, host:port, where that is not a host of Advertise with the ports
	// above: behind a load balancer, or forwarded by a router.
	PublicMQTT, PublicHTTPS []string
	Beat                    time.Duration // heartbeat interval of devices; 0: a minute
	NoClaim                 bool          // let devices in by token only
	// CertificateLife is how long a device's certificate is good; 0: 30 days, at
	// least a minute.
	CertificateLife time.Duration
	EnrolRate       int     // devices a second that may enrol from one address; 0: 50
	Compute         Compute // knows the answers of compute challenges; may be nil
	// Engine is what Compute runs modules with, as in [wire.JobResult]. Only devices whose
	// engine has that version can be trusted; empty: none.
	Engine  string
	Audits  AuditPlan    // challenges that nobody asks for; the zero value is none
	Repair  RepairPlan   // of what devices lose; the zero value is none
	Log     *slog.Logger // nil drops everything
	Version string       // of this program, for who asks

	now          func() time.Time // for tests; nil is time.Now
	ackHold      time.Duration    // for tests; 0 is ackHold
	serve        time.Duration    // for tests; 0 is serveWait
	jobPace      jobPace          // for tests; the zero value is ordinaryPace
	campaignPace campaignPace     // for tests; the zero value is ordinaryCampaigns
	// readLimit is how long a request may take to come, but for an operator's upload
	// (see uploadLimit); for tests; 0 is 5 minutes.
	readLimit time.Duration
	even      func() float64 // for tests; nil cannot be foretold
}

// Coordinator is a running coordinator.
type Coordinator struct {
	cfg  Config
	log  *slog.Logger
	auth *authority
	eng  *engine.Engine
	now  func() time.Time

	started time.Time

	reg       *registry
	tokens    *tokens
	waiting   *waiting
	outbox    *outbox
	sent      *table[sent]
	config    *configs
	storage   *storage
	compute   *compute
	jobs      *jobs
	campaigns *campaigns
	faces     *faces
	audits    *audits
	repairs   *repairs
	releases  *releases
	staging   *staging

	inventories *inventories
	losses      *losses
	leftovers   *leftovers

	enrolling keyed // one enrolment of a device at a time
	uploads   uploads
	cert      *serverCert
	operators *operators
	trail     *trail
	limits    *limits
	heard     *buckets   // by device: what it says
	floods    complaints // what heard has dropped
	refused   complaints // what was not taken
	httpPort  string
	mqttPort  string
	server    *http.Server
	announced *announcement // nil: nothing is
	subs      []*nats.Subscription
	failed    chan error
	closers   []func()
	// life ends with Close, and with it whatever waits for a device.
	life context.Context
	end  context.CancelFunc

	// ready is nil until devices may be let in: the engine asks before the
	// registry is open.
	ready atomic.Pointer[registry]
}

// secretFile, with the keys, is what coordinators of one NATS server share.
const secretFile = "engine.secret"

// ContextFile is the operator's way in, below [Config.Dir].
const ContextFile = "operator.json"

const (
	stagingLife = 24 * time.Hour
	stagingMax  = 16 << 30 // bytes
	auditKept   = 365 * 24 * time.Hour
	closeLimit  = 10 * time.Second // for answers to calls that are under way
	minBeat     = time.Second
	voidSweep   = time.Minute
	startLimit  = 60 * time.Second // for each step of the start but reading records, see loadIdle
	intake      = 4096             // messages of devices that wait, of reports and of others to be looked at
	workers     = 8                // that look at them
)

// Start brings a coordinator up. ctx bounds the start only; see [Coordinator.Close].
func Start(ctx context.Context, cfg Config) (_ *Coordinator, err error) {
	if cfg.Beat == 0 {
		cfg.Beat = time.Minute
	}
	if cfg.Beat < minBeat {
		return nil, fmt.Errorf("devices cannot beat every %s: the shortest interval is %s", cfg.Beat, minBeat)
	}
	if err := cfg.Audits.check(); err != nil {
		return nil, err
	}
	if err := cfg.Repair.check(); err != nil {
		return nil, err
	}
	if cfg.EnrolRate < 0 {
		return nil, fmt.Errorf("%d devices a second cannot enrol: the rate must be above 0", cfg.EnrolRate)
	}
	if cfg.CertificateLife == 0 {
		cfg.CertificateLife = deviceCertLife
	}
	if cfg.CertificateLife < minCertLife || cfg.CertificateLife > caLife {
		return nil, fmt.Errorf("the certificates of devices cannot be good for %s: it is %s at least, and 20 years at most", cfg.CertificateLife, minCertLife)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	for _, a := range slices.Concat(cfg.PublicMQTT, cfg.PublicHTTPS) {
		if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("%q is no public address: it must be HOST:PORT", a)
		}
	}
	c := &Coordinator{cfg: cfg, log: cfg.Log, now: cfg.now, failed: make(chan error, 1)}
	if c.now == nil {
		c.now = time.Now
	}
	c.started = c.now()
	c.life, c.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if c.auth, err = openAuthority(filepath.Join(cfg.Dir, "keys")); err != nil {
		return nil, err
	}
	c.cert = &serverCert{make: func() (tls.Certificate, error) { return c.auth.serverCertificate(c.names()) }, now: c.now, log: c.log}
	if _, err := c.cert.get(nil); err != nil {
		return nil, err
	}
	// The HTTPS port is taken first: it is the one that a second coordinator
	// on this machine would trip over.
	ln, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, portError("HTTPS", cfg.Listen, err)
	}
	c.closers = append(c.closers, func() { ln.Close() })
	if c.announced, err = newAnnouncement(cfg, ln.Addr(), c.auth.caCert, c.log); err != nil {
		return nil, err
	}
	_, c.httpPort, _ = net.SplitHostPort(ln.Addr().String())
	if err := c.startEngine(ctx); err != nil {
		return nil, err
	}
	if err := c.openState(ctx); err != nil {
		if cfg.NATS != "" && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout)) {
			err = fmt.Errorf("the message server stopped answering while the coordinator started; start it again when the server is back: %w", err)
		}
		return nil, err
	}
	if err := c.operatorContext(ln.Addr()); err != nil {
		return nil, err
	}
	if err := c.listen(); err != nil {
		return nil, err
	}
	c.ready.Store(c.reg)
	c.eng.Open()
	c.serve(ln)
	if c.announced != nil {
		c.announced.start(c.life)
		c.closers = append(c.closers, c.announced.close)
	}
	return c, nil
}

func portError(what, addr string, err error) error {
	return fmt.Errorf("the %s address %s cannot be opened: %w; stop what uses it or choose another", what, addr, err)
}

// names are what the server certificate is good for.
func (c *Coordinator) names() []string {
	names := slices.Concat([]string{"localhost", "127.0.0.1", "::1"}, c.cfg.Advertise, c.cfg.CertNames)
	for _, a := range slices.Concat(c.cfg.PublicMQTT, c.cfg.PublicHTTPS) {
		if host, _, err := net.SplitHostPort(a); err == nil {
			names = append(names, host)
		}
	}
	if h, err := os.Hostname(); err == nil {
		names = append(names, h)
	}
	if host, _, err := net.SplitHostPort(c.cfg.Listen); err == nil && host != "" && host != "0.0.0.0" && host != "::" {
		names = append(names, host)
	} else if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && !n.IP.IsLinkLocalUnicast() {
				names = append(names, n.IP.String())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (c *Coordinator) startEngine(ctx context.Context) error {
	secret, err := loadOrMake(filepath.Join(c.cfg.Dir, "keys", secretFile), engine.NewSecret)
	if err != nil {
		return err
	}
	ec := engine.Config{
		URL: c.cfg.NATS, Secret: secret, Log: c.log, Sync: orderSync, Hold: true,
		Authorize: func(ctx context.Context, id wire.DeviceID, cert *x509.Certificate) error {
			r := c.ready.Load()
			if r == nil {
				return errors.New("the coordinator is starting")
			}
			return r.authorize(ctx, id, cert)
		},
	}
	if c.cfg.NATS == "" {
		ec.Dir, ec.MQTTListen = filepath.Join(c.cfg.Dir, "nats"), c.cfg.MQTT
		ec.TLS = &tls.Config{GetCertificate: c.cert.get, ClientCAs: c.auth.pool()}
	} else {
		ec.DialTLS = &tls.Config{RootCAs: c.auth.pool()}
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if c.eng, err = engine.Start(ctx, ec); err != nil {
		return err
	}
	addr := c.cfg.MQTT
	if c.cfg.NATS == "" {
		addr = c.eng.MQTTAddr()
	}
	if _, c.mqttPort, err = net.SplitHostPort(addr); err != nil {
		return fmt.Errorf("%q is no address for MQTT: %w", addr, err)
	}
	return nil
}

// orderSync is how often the state is synced to disk, by the embedded engine and
// by a server with the configuration of [WriteNATSConfig]. It bounds what a power
// cut can take of what was acknowledged to an operator. A device's report is
// acknowledged only when it is older (see ackHold): one that is lost comes again.
const orderSync = time.Second

// openState opens every bucket and the services on them.
func (c *Coordinator) openState(ctx context.Context) error {
	c.reg = newRegistry(c.log, c.now)
	c.reg.away = missedBeats * c.cfg.Beat
	c.tokens = &tokens{written: c.reg.written, now: c.now}
	c.waiting = newWaiting(wire.Fingerprint(c.auth.caCert.Raw), c.now)
	c.outbox = newOutbox(c.auth.orderKey, c.publish, c.reg.online, c.now, c.log)
	c.outbox.member = c.reg.member
	if c.cfg.ackHold > 0 {
		c.outbox.hold = c.cfg.ackHold
	}
	c.heard = newBuckets(hearRate, hearBurst)
	c.config = newConfigs(c.reg, c.outbox, c.now, c.log)
	c.reg.beatOf, c.reg.note = c.config.beat, c.note
	c.inventories = newInventories(c.reg, c.outbox, c.now, c.log)
	c.storage = &storage{life: c.life, networks: networks{now: c.now}, wait: cmp.Or(c.cfg.serve, serveWait), outbox: c.outbox, reg: c.reg, auth: c.auth, log: c.log,
		holds: make(map[wire.DeviceID]map[string]int64), where: make(map[string][]spotOn), on: make(map[wire.DeviceID]map[string]int), stripes: stripes{now: c.now}, resting: resting{now: c.now}}
	c.audits = newAudits(c.storage, c.outbox, c.cfg.Compute, c.cfg.Engine, c.cfg.Audits, c.log)
	c.outbox.jobEnded = c.audits.honesty.ended
	if c.cfg.even != nil {
		c.audits.honesty.even = c.cfg.even
	}
	c.storage.trust, c.storage.missed, c.storage.durable = c.audits.trust, c.audits.missed, c.eng.Durable
	c.repairs = newRepairs(c.storage, c.audits, c.cfg.Repair, 2*missedBeats*c.cfg.Beat, c.log)
	c.repairs.alone, c.repairs.drains = c.cfg.NATS == "", newDrains(c.repairs, c.note)
	c.storage.leaving, c.storage.touched, c.storage.intended = c.repairs.drains.leaving, c.repairs.touch, c.repairs.intended
	c.compute = &compute{outbox: c.outbox, reg: c.reg, auth: c.auth, given: c.audits.honesty.given}
	c.audits.compute = c.compute
	c.jobs = newJobs(c.compute, c.storage, c.log)
	c.jobs.pace = cmp.Or(c.cfg.jobPace, ordinaryPace)
	c.jobs.honesty, c.audits.honesty.jobs, c.audits.caught = c.audits.honesty, c.jobs, c.jobs.noteCaught
	c.jobs.self, c.jobs.leaving, c.jobs.trust = c.repairs.self, c.repairs.drains.leaving, c.audits.mayComputeAs
	c.campaigns = newCampaigns(c.reg, c.outbox, c.now, c.log)
	c.campaigns.beat = c.cfg.Beat
	c.campaigns.pace = cmp.Or(c.cfg.campaignPace, ordinaryCampaigns)
	c.campaigns.pace.hears = 2 * missedBeats * c.cfg.Beat
	c.campaigns.note, c.campaigns.releases = c.note, func() *releases { return c.releases }
	c.outbox.updates = c.campaigns.heard
	c.faces = newFaces(c.now, c.log)
	c.faces.note, c.faces.releases = c.note, c.campaigns.releases
	c.campaigns.forks = c.faces.forks
	c.leftovers = newLeftovers(c.repairs, c.now, c.log)
	c.outbox.undropped = c.leftovers.undropped
	c.losses = newLosses(c.reg, c.outbox, c.storage, c.audits, c.now, c.log)
	c.operators, c.limits = &operators{}, newLimits(c.cfg.EnrolRate)
	for _, open := range []func() error{ // one after the other: what is wrong is said once
		func() error {
			return bucket(ctx, c, "devices", &c.reg.rows, func(id string, d api.DeviceRecord, gone bool) {
				c.reg.track(id, d, gone)
				c.config.trackDevice(d, gone)
			})
		},
		func() error { return c.inventories.open(ctx, c) },
		func() error { return bucket(ctx, c, "losses", &c.losses.rows, nil) },
		func() error { return bucket(ctx, c, "leftovers", &c.leftovers.rows, nil) },
		func() error { return bucket(ctx, c, "tokens", &c.tokens.rows, nil) },
		func() error {
			return bucket(ctx, c, "pending", &c.waiting.rows, c.waiting.track, func(k *jetstream.KeyValueConfig) { k.TTL = pendingKept })
		},
		func() error { return bucket(ctx, c, "operators", &c.operators.rows, c.operators.index) },
		func() (err error) {
			ctx, cancel := context.WithTimeout(ctx, startLimit)
			defer cancel()
			c.trail, err = openTrail(ctx, c.eng, c.now)
			return err
		},
		func() error { return c.openOrders(ctx) },
		func() error { return bucket(ctx, c, "configured", &c.config.rows, c.config.trackRow) },
		func() error { return bucket(ctx, c, "config", &c.config.docs, c.config.trackDoc) },
		func() error { return bucket(ctx, c, "chunks", &c.storage.chunks, c.storage.trackChunk) },
		func() error { return bucket(ctx, c, "objects", &c.storage.objects, nil) },
		func() error { return c.audits.open(ctx, c) },
		func() error { return c.repairs.open(ctx, c) },
		func() error { return c.jobs.openRows(ctx, c) },
		func() error { return bucket(ctx, c, "campaigns", &c.campaigns.rows, nil) },
		func() error { return bucket(ctx, c, "checkpoints", &c.faces.rows, nil) },
	} {
		if err := open(); err != nil {
			return err
		}
	}
	if err := c.record(ctx, api.LogEntry{Actor: "coordinator", Action: "coordinator.start"}); err != nil {
		c.log.Warn("this start is not on the audit log; changes are refused until it can be written", "error", err)
	}
	step, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	files, err := c.eng.Objects(step, "staging", func(o *jetstream.ObjectStoreConfig) { o.TTL = stagingLife })
	if err != nil {
		return err
	}
	repo, err := c.eng.Objects(step, "repo")
	if err != nil {
		return err
	}
	c.staging = newStaging(files)
	c.staging.free, c.staging.most = c.eng.Free, stagingMax
	c.storage.staging, c.audits.staging, c.inventories.staging, c.losses.staging = c.staging, c.staging, c.staging, c.staging
	c.leftovers.staging = c.staging
	c.compute.staging = c.staging
	c.jobs.leader, c.campaigns.leader = c.leads("jobs", c.jobs.pace.lease), c.leads("campaigns", c.campaigns.pace.lease)
	cache := newStaging(repo)
	cache.free = c.eng.Free
	c.releases = &releases{files: repo, cache: cache, turn: func(ctx context.Context) (func(), error) {
		return c.repairs.turn(ctx, turnKey, turnLife)
	}}
	c.storage.resume()
	if c.cfg.NATS == "" {
		return c.audits.void(ctx, c.now()) // nobody else can be waiting for one
	}
	return nil
}

// leads is what one coordinator at a time does.
func (c *Coordinator) leads(name string, life time.Duration) *leader {
	return &leader{leases: c.repairs.leases, name: name, self: c.repairs.self, alone: c.repairs.alone, life: life, now: c.now, log: c.log}
}

func (c *Coordinator) openKV(ctx context.Context, name string, edit ...func(*jetstream.KeyValueConfig)) (jetstream.KeyValue, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	return c.eng.KV(ctx, name, edit...)
}

// bucket opens one kind of record.
func bucket[T any](ctx context.Context, c *Coordinator, name string, into **table[T], onEach func(string, T, bool), edit ...func(*jetstream.KeyValueConfig)) error {
	kv, err := c.openKV(ctx, name, edit...)
	if err != nil {
		return err
	}
	t, err := openTable(ctx, kv, strings.TrimSuffix(name, "s"), onEach, loggingTo[T](c.log))
	if err != nil {
		return err
	}
	*into = t
	c.closers = append(c.closers, t.close)
	return nil
}

// operatorContext makes the operator's token at the first start, and writes
// where this coordinator is now.
func (c *Coordinator) operatorContext(addr net.Addr) error {
	path := filepath.Join(c.cfg.Dir, ContextFile)
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "localhost"
	}
	ctx := api.Context{URL: "https://" + net.JoinHostPort(host, port), CA: string(c.auth.caPEM)}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		secret := make([]byte, 32)
		rand.Read(secret)
		ctx.Token = base64.RawURLEncoding.EncodeToString(secret)
	} else if old, err := api.LoadContext(path); err == nil {
		ctx.Token = old.Token
	} else {
		// A new token would lock out every operator, without a word.
		return fmt.Errorf("the operator's context %s cannot be read: put an operator's copy back, or remove the file to get a new token (the old one then ends): %w", path, err)
	}
	c.operators.owner = sha256.Sum256([]byte(ctx.Token))
	raw, err := json.MarshalIndent(ctx, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("the operator's context cannot be saved: %w", err)
	}
	return nil
}

func (c *Coordinator) publish(d wire.DeviceID, raw []byte) error {
	return c.eng.Conn().Publish(wire.Subject(d, wire.ChannelOrder), raw)
}

// listen takes in what devices say. Reports and hellos go to one coordinator of
// a group; beats and presence change memory, so everybody hears them.
func (c *Coordinator) listen() error {
	ctx, cancel := context.WithCancel(context.Background())
	// Reports have a queue of their own: they cost most, and however many there
	// are, it is heard who is there.
	msgs, reports := make(chan *nats.Msg, intake), make(chan *nats.Msg, intake)
	var wg sync.WaitGroup
	for _, queue := range []chan *nats.Msg{msgs, reports} {
		for range workers {
			wg.Go(func() {
				for {
					select {
					case m := <-queue:
						c.hear(ctx, m)
					case <-ctx.Done():
						return
					}
				}
			})
		}
	}
	wg.Go(func() { c.outbox.run(ctx) })
	wg.Go(func() { c.config.run(ctx) })
	wg.Go(func() { c.inventories.run(ctx) })
	wg.Go(func() { c.losses.run(ctx) })
	wg.Go(func() { c.leftovers.run(ctx) })
	wg.Go(func() { c.audits.sweep(ctx, c.log) })
	wg.Go(func() { c.audits.rounds.run(ctx) })
	wg.Go(func() { c.audits.honesty.keep(ctx) })
	wg.Go(func() { c.audits.honesty.challenge(ctx) })
	wg.Go(func() { c.audits.honesty.judge(ctx, c.cfg.NATS == "") })
	wg.Go(func() { c.storage.sweep(ctx) })
	wg.Go(func() { c.repairs.run(ctx) })
	wg.Go(func() { c.jobs.run(ctx) })
	wg.Go(func() { c.campaigns.run(ctx) })
	wg.Go(func() { c.keepMembers(ctx) })
	wg.Go(func() { c.cutOffRetired(ctx) })
	wg.Go(func() {
		t := time.NewTicker(c.cfg.Beat)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				c.reg.expire()
			case <-ctx.Done():
				return
			}
		}
	})
	c.closers = append(c.closers, func() { cancel(); wg.Wait(); c.outbox.closeAcks() })
	nc := c.eng.Conn()
	for _, ch := range []wire.Channel{wire.ChannelBeat, wire.ChannelPresence} {
		s, err := nc.ChanSubscribe(wire.Subject("", ch), msgs)
		if err != nil {
			return fmt.Errorf("listening to devices: %w", err)
		}
		c.subs = append(c.subs, s)
	}
	s, err := nc.ChanQueueSubscribe(wire.Subject("", wire.ChannelReport), "coordinators", reports)
	if err != nil {
		return fmt.Errorf("listening to devices: %w", err)
	}
	c.subs = append(c.subs, s)
	return nc.Flush()
}

// hear takes one message of a device. What is not signed by the device whose
// topic it came on is dropped.
func (c *Coordinator) hear(ctx context.Context, m *nats.Msg) {
	id, ch, err := wire.ParseSubject(m.Subject)
	now := c.now()
	if err == nil {
		if c.heard.take(string(id), now) > 0 {
			if n := c.floods.add(id, now); n > 0 {
				c.log.Warn("a device says more than anybody may; messages were dropped", "device", id, "dropped", n)
			}
			return
		}
		switch ch {
		case wire.ChannelReport:
			err = c.hearReport(ctx, id, m.Data)
		case wire.ChannelPresence:
			err = c.hearPresence(ctx, id, m.Data)
		case wire.ChannelBeat:
			var b wire.Beat
			if b, err = openFrom[wire.Beat](c.reg, id, wire.TypeBeat, m.Data); err == nil {
				c.reg.beat(b)
				c.storage.resting.said(b)
				c.inventories.announced(id)
				c.losses.announced(id)
				c.jobs.poke()
				c.outbox.pump(id) // a coordinator that was restarted hears no hello
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		if n := c.refused.add(id, now); n > 0 {
			c.log.Warn("a device's message was not taken", "subject", m.Subject, "times", n, "error", err)
		}
	}
}

func (c *Coordinator) hearReport(ctx context.Context, id wire.DeviceID, raw []byte) error {
	r, err := openFrom[wire.Report](c.reg, id, wire.TypeReport, raw)
	if err != nil {
		return err
	}
	c.reg.seen(id)
	c.storage.resting.heard(r) // before who waits for it asks the next device
	if err := c.faces.heard(ctx, r); err != nil {
		return err
	}
	if err := c.outbox.report(ctx, r, raw); err != nil {
		return err
	}
	c.config.heard(r)
	c.inventories.heard(r)
	c.losses.heard(r)
	c.leftovers.heard(r)
	return nil
}

func (c *Coordinator) hearPresence(ctx context.Context, id wire.DeviceID, raw []byte) error {
	p, err := openFrom[wire.Presence](c.reg, id, wire.TypePresence, raw)
	if err != nil {
		return err
	}
	what, err := c.reg.presence(ctx, p)
	if err != nil || what == saidNothing {
		return err
	}
	w, err := wire.Seal(c.auth.orderKey, wire.TypeWelcome, wire.Welcome{Device: id, Nonce: p.Nonce, Time: c.now().UTC()})
	if err != nil {
		return err
	}
	if err := c.publish(id, w); err != nil {
		return err
	}
	if what == saidAgain {
		return nil
	}
	c.outbox.hello(id)
	c.repairs.arrived()
	c.jobs.poke()
	c.campaigns.poke()
	c.config.hello(p)
	c.inventories.announced(id)
	c.losses.announced(id)
	c.leftovers.arrived(id)
	return nil
}

func (c *Coordinator) serve(ln net.Listener) {
	c.server = &http.Server{
		Handler:           c.routes(),
		ReadHeaderTimeout: 45 * time.Second, // of the TLS handshake too, over a link that is mostly away
		ReadTimeout:       cmp.Or(c.cfg.readLimit, 5*time.Minute),
		BaseContext:       func(net.Listener) context.Context { return c.life },
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(c.log.Handler(), slog.LevelDebug), // other people's broken handshakes
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS13,
			GetCertificate: c.cert.get,
			ClientCAs:      c.auth.pool(),
			ClientAuth:     tls.VerifyClientCertIfGiven,
		},
	}
	go func() {
		if err := c.server.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
			c.fail(fmt.Errorf("the HTTPS server ended: %w", err))
		}
	}()
	go func() {
		select {
		case err := <-c.eng.Failed():
			c.fail(err)
		case <-c.life.Done():
		}
	}()
}

// fail ends the coordinator; the first reason is enough.
func (c *Coordinator) fail(err error) {
	select {
	case c.failed <- err:
	default:
	}
}

// outlive is for work that must come to its end though who asked for it has
// left. It ends with the coordinator.
func (c *Coordinator) outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return outlive(ctx, c.life)
}

func outlive(ctx, life context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(life, cancel)
	return ctx, func() { stop(); cancel() }
}

// Failed gives the reason if the coordinator ends by itself.
func (c *Coordinator) Failed() <-chan error { return c.failed }

// URL is the address of API, enrolment and data plane on this machine.
func (c *Coordinator) URL() string { return "https://" + net.JoinHostPort("localhost", c.httpPort) }

// Broker is the MQTT listener's port.
func (c *Coordinator) Broker() string { return c.mqttPort }

// Announced is what the local network is told; "" if nothing is.
func (c *Coordinator) Announced() string {
	if c.announced == nil {
		return ""
	}
	return c.announced.String()
}

// Close ends everything in good order, within a bound. Calls that wait for a
// device are ended first: what they began is in the outbox and goes on after the
// next start.
func (c *Coordinator) Close() {
	c.end()
	if c.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
		if c.server.Shutdown(ctx) != nil {
			c.server.Close()
		}
		cancel()
	}
	for _, s := range c.subs {
		_ = s.Unsubscribe() // fails only when the connection is gone, which is the aim
	}
	for _, f := range slices.Backward(c.closers) {
		f()
	}
	if c.eng != nil {
		if err := c.eng.Close(); err != nil {
			c.log.Warn("the engine did not end in good order", "error", err)
		}
	}
}
