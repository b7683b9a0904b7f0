package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/packaging/tour"
)

type serveCmd struct {
	Dir         string   `default:"deimos" env:"DEIMOS_DIR" type:"path" placeholder:"DIR" help:"Folder for keys and state (${default})."`
	Listen      string   `default:":8443" env:"DEIMOS_LISTEN" placeholder:"ADDR" help:"HTTPS address for operators, enrolment and data (${default})."`
	MQTT        string   `default:":8883" env:"DEIMOS_MQTT" placeholder:"ADDR" help:"MQTT address for devices (${default}). With --nats: the address where devices find that server's MQTT listener."`
	NATS        string   `env:"DEIMOS_NATS" placeholder:"URL" help:"Use this NATS server instead of the embedded one; \"deimos serve --print-nats-config\" shows its configuration."`
	Advertise   []string `env:"DEIMOS_ADVERTISE" placeholder:"HOST" help:"Host name or address that devices use; may be repeated. Default: the one they enrol by."`
	CertNames   []string `name:"cert-name" env:"DEIMOS_CERT_NAMES" placeholder:"HOST" help:"Another host name or address that the certificate is good for, beside this machine's and --advertise; may be repeated."`
	Announce    string   `env:"DEIMOS_ANNOUNCE" placeholder:"NAME" help:"Name under which devices on the local network find this coordinator (DNS-SD), or \"off\". Default: this machine's name; off on a loopback address."`
	EnrolRate   int      `default:"50" env:"DEIMOS_ENROL_RATE" placeholder:"N" help:"How many devices a second may enrol from one address (${default}). More for a large site behind one address."`
	PublicMQTT  []string `name:"public-mqtt" env:"DEIMOS_PUBLIC_MQTT" placeholder:"HOST:PORT" help:"Where devices reach the MQTT listener, if a router or load balancer stands before it; may be repeated."`
	PublicHTTPS []string `name:"public-https" env:"DEIMOS_PUBLIC_HTTPS" placeholder:"HOST:PORT" help:"The same for the HTTPS listener."`
	Beat        duration `default:"1m" help:"Heartbeat interval of devices (${default})."`

	NoClaim         bool     `name:"no-claim" env:"DEIMOS_NO_CLAIM" help:"Let devices in by fleet token only; by default they can also wait to be claimed."`
	CertificateLife duration `default:"30d" env:"DEIMOS_CERTIFICATE_LIFE" help:"How long a device's certificate is good, at least a minute (${default}); it is renewed at two thirds."`

	AuditLeaves   int      `default:"90" env:"DEIMOS_AUDIT_LEAVES" placeholder:"N" help:"How many 4 KiB pieces of what it should hold each device has to prove a day (${default}); 90 find a loss of 5% in 99 of 100 cases. 0: none."`
	AuditInterval duration `default:"8h" env:"DEIMOS_AUDIT_INTERVAL" help:"Mean time between two challenges of a device (${default}); when the next comes cannot be foretold."`

	AuditJobs bool `default:"true" negatable:"" env:"DEIMOS_AUDIT_JOBS" help:"Give devices jobs whose result is known among those of customers: a fifth of a new device's jobs, a twentieth of a trusted one's. They are worked out here beforehand, with a quarter of a processor at most."`

	RepairAtOnce int      `default:"4" env:"DEIMOS_REPAIR_AT_ONCE" placeholder:"N" help:"How many stripes are repaired at a time (${default}). 0: none, and no device can be drained."`
	RepairRate   int64    `default:"32" env:"DEIMOS_REPAIR_RATE" placeholder:"MIB" help:"How many MiB a second repair reads from devices and sends to them (${default})."`
	RepairGrace  duration `default:"1d" env:"DEIMOS_REPAIR_GRACE" help:"How long a device, or a disk of one, may be away until what it holds is made anew elsewhere (${default})."`

	Pprof string `placeholder:"ADDR" help:"Serve Go's profiles (net/http/pprof) on this loopback address, for finding out what it is busy with."`

	PrintNATSConfig bool `name:"print-nats-config" help:"Print the configuration of an external NATS server for this coordinator's keys, and end."`
	cli.LogFlags
}

// check refuses what can be seen to be wrong without trying.
func (s *serveCmd) check() error {
	for _, a := range []struct{ flag, addr string }{{"--listen", s.Listen}, {"--mqtt", s.MQTT}} {
		_, port, err := net.SplitHostPort(a.addr)
		if _, bad := net.LookupPort("tcp", port); err != nil || bad != nil {
			return fmt.Errorf("%s %q is no address: it looks like :8443 or 192.0.2.1:8443", a.flag, a.addr)
		}
	}
	if time.Duration(s.Beat) < time.Second {
		return fmt.Errorf("--beat %s: devices beat every second at most", s.Beat)
	}
	if time.Duration(s.CertificateLife) < time.Minute {
		return fmt.Errorf("--certificate-life %s: a certificate is good for at least a minute", s.CertificateLife)
	}
	return nil
}

func (s *serveCmd) Run(ctx context.Context) error {
	if err := s.check(); err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	cfg := coordinator.Config{
		Dir: s.Dir, Listen: s.Listen, MQTT: s.MQTT, NATS: s.NATS, Advertise: s.Advertise, PublicMQTT: s.PublicMQTT, PublicHTTPS: s.PublicHTTPS, CertNames: s.CertNames, Announce: s.Announce, EnrolRate: s.EnrolRate, Beat: time.Duration(s.Beat),
		NoClaim: s.NoClaim, CertificateLife: time.Duration(s.CertificateLife),
		Audits: coordinator.AuditPlan{Leaves: s.AuditLeaves, Interval: time.Duration(s.AuditInterval), Jobs: s.AuditJobs},
		Repair: coordinator.RepairPlan{AtOnce: s.RepairAtOnce, Rate: s.RepairRate << 20, Grace: time.Duration(s.RepairGrace)},
		Log:    cli.Logger(s.LogFormat, s.LogLevel), Version: version,
	}
	if s.PrintNATSConfig {
		return coordinator.WriteNATSConfig(os.Stdout, cfg)
	}
	if s.Pprof != "" {
		end, err := profiles(s.Pprof)
		if err != nil {
			return &cli.Error{Code: cli.ExitUsage, Err: err}
		}
		defer end()
	}
	engine := newEngine(s.Dir, cfg.Log)
	defer engine.close() // after the coordinator
	cfg.Compute, cfg.Engine = engine.compute, sandbox.Engine()
	c, err := coordinator.Start(ctx, cfg)
	if err != nil {
		return &cli.Error{Code: cli.ExitNoCreate, Err: err}
	}
	defer c.Close()
	context := filepath.Join(s.Dir, coordinator.ContextFile)
	fmt.Printf("%s at %s, MQTT on port %s\n\nTo use it from this machine:\n  export DEIMOS_CONTEXT=%s\n  deimos token create\n",
		api.Ready, c.URL(), c.Broker(), shellWord(context))
	if a := c.Announced(); a != "" {
		fmt.Printf("\nDevices on this network find it by themselves: %s. --announce off ends that.\n", a)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-c.Failed():
		return err
	}
}

// shellWord is a text as one word of a POSIX shell.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@%,", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// profiles serves Go's profiles until end. They tell memory's content, so only
// this machine may ask.
func profiles(addr string) (end func(), err error) {
	host, _, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("%q is no loopback address with a port, like 127.0.0.1:6060", addr)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("the address for profiles cannot be opened: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go server.Serve(ln) // ends with Close
	return func() { server.Close() }, nil
}

type devCmd struct {
	Dir   string `type:"path" placeholder:"DIR" help:"Empty folder for the fleet. Default: a new one, removed at the end."`
	File  string `type:"existingfile" placeholder:"FILE" help:"File to store. Default: the agent's own binary."`
	Image string `type:"existingfile" placeholder:"FILE" help:"Image of a device (make image): all devices but the first are machines that start it in QEMU."`
	Once  bool   `help:"End after the tour."`
	Bin   string `type:"existingdir" placeholder:"DIR" help:"Folder with the programs that \"make build\" made. Default: the one that this program is in."`
}

func (d *devCmd) Run(ctx context.Context) error {
	bin := d.Bin
	if bin == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("this program cannot find itself: %w; name its folder with --bin", err)
		}
		bin = filepath.Dir(self)
	}
	return tour.Run(ctx, tour.Options{Bin: bin, Dir: d.Dir, File: d.File, Image: d.Image, Once: d.Once, Out: os.Stdout})
}
