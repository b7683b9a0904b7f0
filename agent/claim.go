package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/wire"
)

// How a device gets in. With a fleet token it believes the authority that the
// token pins, and is a member as soon as the coordinator answers. Without one
// it believes who answers first at the address it was given, keeps that
// authority before it says a word, and waits under a code made of it and the
// device's own key. Somebody who stands between has another authority, so the
// code that the owner reads off the device is not the one that the coordinator
// knows, and nobody claims it.

// pending is what a device keeps while it waits to be claimed.
type pending struct {
	Coordinator string `json:"coordinator"`
	Authority   []byte `json:"authority"` // PEM, the first that was seen there
}

const (
	pendingFile = "pending.json"
	claimFile   = "claim" // the code and a line break, for a page or a display

	enrolMin    = time.Second
	enrolMax    = time.Minute
	enrolAnew   = 2 * time.Minute  // for a member with the token of another fleet
	claimMin    = time.Second      // between two questions, whatever the coordinator says
	claimMax    = 10 * time.Minute // the same
	claimRemind = 10 * time.Minute // between two lines with the code in the log
)

// loadPending returns nil without error where the device waits for nobody.
func loadPending(dir string) (*pending, error) {
	path := filepath.Join(dir, pendingFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("what this device knows of its coordinator cannot be read: %w", err)
	}
	var p pending
	if err := json.Unmarshal(raw, &p); err != nil || p.ca() == nil {
		return nil, fmt.Errorf("%s is damaged: remove it; the device then has a claim code of its own again, which may be another one", path)
	}
	return &p, nil
}

func (p *pending) save(dir string) error {
	raw, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, pendingFile), raw, 0o600)
}

func (p *pending) ca() *x509.Certificate {
	return (&Membership{EnrolReply: wire.EnrolReply{CA: p.Authority}}).authority()
}

// code is what the owner reads off the device.
func code(id Identity, ca *x509.Certificate) string {
	return wire.ClaimCode(id.key.Public().(ed25519.PublicKey), wire.Fingerprint(ca.Raw))
}

// join makes sure that the device is a member: from its disk, with a token, or
// by waiting to be claimed. It tries until it succeeds or is refused.
func (a *Agent) join(ctx context.Context) error {
	dir := a.cfg.path("identity")
	m, err := loadMembership(dir, a.id)
	if err != nil {
		return err
	}
	switch {
	case m == nil && a.cfg.Coordinator == "":
		return ErrNotEnrolled
	case m == nil && a.cfg.Token == "":
		return a.waitForClaim(ctx, dir)
	case m == nil:
		return a.enrolNow(ctx, a.cfg.Coordinator)
	}
	a.member.Store(m)
	a.clock.Raise(m.issued())
	a.forgetClaim()
	if a.cfg.Token == "" {
		return nil
	}
	tok, err := wire.ParseFleetToken(a.cfg.Token)
	switch {
	case err != nil:
		a.log.Error("the token in the configuration cannot be read; this device is a member and needs none", "error", err)
	case tok.Fingerprint != wire.Fingerprint(m.authority().Raw):
		return a.enrolAnew(ctx, m)
	}
	return nil // a token of its own fleet gives a member nothing that it has not
}

// enrolAnew is for a member that is given a token of another fleet, to move
// there. What fails leaves it where it is.
func (a *Agent) enrolAnew(ctx context.Context, old *Membership) error {
	base := a.cfg.Coordinator
	if base == "" {
		base = old.Coordinator
	}
	limited, cancel := context.WithTimeout(ctx, enrolAnew)
	defer cancel()
	if err := a.enrolNow(limited, base); err != nil && ctx.Err() == nil {
		a.log.Error("the token in the configuration is of another fleet, and this device could not join that; it stays where it is, and the next start tries again",
			"coordinator", old.Coordinator, "error", plain(err))
	}
	return ctx.Err()
}

// maxRequest is the largest inventory that goes with a request, in bytes: a
// machine with hundreds of disks must come in, too. It is asked for more later.
const maxRequest = 64 << 10

// request is what the device says of itself; the token is to be added.
func (a *Agent) request() (wire.EnrolRequest, error) {
	inv, err := json.Marshal(a.hw.inventory().Inventory)
	if len(inv) > maxRequest {
		inv = nil
	}
	return wire.EnrolRequest{Agent: a.cfg.Version, OS: runtime.GOOS, Arch: runtime.GOARCH, Board: a.hw.board.Name, Inventory: inv}, err
}

// enrolNow enrols with the configured token and keeps the answer.
func (a *Agent) enrolNow(ctx context.Context, base string) error {
	tok, err := wire.ParseFleetToken(a.cfg.Token)
	if err != nil {
		return err
	}
	req, err := a.request()
	if err != nil {
		return err
	}
	req.Token = tok.String()
	for wait := enrolMin; ; wait = min(2*wait, enrolMax) {
		m, _, err := enrol(ctx, a.id, pinned(tok.Fingerprint, a.clock), base, req)
		switch {
		case err == nil:
			return a.enrolled(m)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errStranger):
			return ErrUntrusted
		case errors.Is(err, ErrRefused), errors.Is(err, ErrAddress):
			return err
		}
		pause := max(wait/2+rand.N(wait), putOff(err))
		a.log.Warn("the coordinator cannot be reached to enrol; trying again", "coordinator", base, "in", pause.Round(time.Millisecond).String(), "error", plain(err))
		if err := a.rest(ctx, pause); err != nil {
			return err
		}
	}
}

// enrolled keeps a membership that was checked: first on disk, then in force.
func (a *Agent) enrolled(m *Membership) error {
	if err := ota.Enrolled(a.cfg.StateDir, m.UpdateRoot); err != nil {
		return fmt.Errorf("the enrolment is not taken: %w", err)
	}
	if err := m.save(a.cfg.path("identity")); err != nil {
		return fmt.Errorf("the enrolment cannot be saved: %w", err)
	}
	a.member.Store(m)
	a.clock.Raise(m.issued())
	a.forgetClaim()
	a.log.Info("enrolled", "coordinator", m.Coordinator, "until", m.ends().Format(time.RFC3339))
	return nil
}

// waitForClaim asks until somebody has claimed this device.
func (a *Agent) waitForClaim(ctx context.Context, dir string) error {
	ca, err := a.firstSeen(ctx, dir)
	if err != nil {
		return err
	}
	req, err := a.request()
	if err != nil {
		return err
	}
	a.hw.at(atClaim)
	defer a.hw.at(atStart)
	var told time.Time
	for wait := enrolMin; ; {
		m, p, err := enrol(ctx, a.id, knows(ca, a.clock), a.cfg.Coordinator, req)
		switch {
		case m != nil && err == nil:
			return a.enrolled(m)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrRefused):
			a.forgetClaim()
			return err
		case err == nil:
			a.hw.answered(true)
			wait = enrolMin
			if told.IsZero() || time.Since(told) > claimRemind {
				told = time.Now()
				a.showClaim(ca)
			}
			if err := a.rest(ctx, between(p.RetrySeconds)); err != nil {
				return err
			}
			continue
		case errors.Is(err, errStranger):
			a.log.Error("somebody else answers than when this device first asked, and is told nothing; if the coordinator was set up anew, remove "+filepath.Join(dir, pendingFile)+" and start the agent again, or give it the fleet's token in its configuration; else somebody stands between",
				"coordinator", a.cfg.Coordinator)
		default:
			a.hw.answered(false)
			a.log.Warn("the coordinator cannot be asked whether this device was claimed; trying again", "coordinator", a.cfg.Coordinator, "error", plain(err))
		}
		if err := a.rest(ctx, max(wait/2+rand.N(wait), putOff(err))); err != nil {
			return err
		}
		wait = min(2*wait, claimMax)
	}
}

// between is the wait that a coordinator asks for, if it is one, and a little
// more, so that devices that came together do not stay together.
func between(seconds int) time.Duration {
	d := min(max(time.Duration(min(seconds, 3600))*time.Second, claimMin), claimMax)
	return d + rand.N(d/4)
}

// putOff is how long a coordinator that has too much to do wants to be left
// alone, with the same bounds and jitter; 0 if it did not say.
func putOff(err error) time.Duration {
	var b *busy
	if !errors.As(err, &b) || b.after <= 0 {
		return 0
	}
	return between(b.after)
}

// firstSeen is the authority that answered first at the configured address. It
// is on disk before it is used.
func (a *Agent) firstSeen(ctx context.Context, dir string) (*x509.Certificate, error) {
	u, err := address(a.cfg.Coordinator)
	if err != nil {
		return nil, err
	}
	p, err := loadPending(dir)
	if err != nil {
		return nil, err
	}
	if p != nil && p.Coordinator == a.cfg.Coordinator { // else its owner has sent it elsewhere
		return p.ca(), nil
	}
	for wait := enrolMin; ; wait = min(2*wait, enrolMax) {
		ca, err := a.meet(ctx, u.Host)
		switch {
		case err == nil:
			p := pending{a.cfg.Coordinator, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})}
			if err := p.save(dir); err != nil {
				return nil, fmt.Errorf("the coordinator's authority cannot be saved: %w", err)
			}
			return ca, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
		pause := wait/2 + rand.N(wait)
		a.log.Warn("the coordinator cannot be reached to wait for a claim; trying again", "coordinator", a.cfg.Coordinator, "in", pause.Round(time.Millisecond).String(), "error", plain(err))
		if err := a.rest(ctx, pause); err != nil {
			return nil, err
		}
	}
}

func (a *Agent) meet(ctx context.Context, addr string) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, enrolLimit)
	defer cancel()
	return whoServes(ctx, a.clock, addr)
}

// showClaim tells the owner the code.
func (a *Agent) showClaim(ca *x509.Certificate) {
	c := code(a.id, ca)
	a.log.Warn("This device waits to be claimed. Its code is " + c + "; the fleet manager types: deimos device claim " + c)
	if err := durable.WriteFile(a.cfg.path(claimFile), []byte(c+"\n"), 0o644); err != nil {
		a.log.Warn("the claim code cannot be written to a file", "error", err)
	}
}

// forgetClaim removes what only a device that waits has. A power cut may leave
// it behind; then the next start removes it.
func (a *Agent) forgetClaim() {
	for _, path := range []string{a.cfg.path(claimFile), a.cfg.path("identity", pendingFile)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.log.Warn("the claim code's file cannot be removed", "error", err)
		}
	}
}
