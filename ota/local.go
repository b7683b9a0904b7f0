package ota

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// localPrefix begins what an update by the owner's wish is called where others have the
// id of their order; no order's id has a dash.
const localPrefix = "local-"

// LocalOrder is what the update of the owner's wish with this id is called.
func LocalOrder(id string) string { return localPrefix + id }

// IsLocal tells such a name from the id of an order.
func IsLocal(order string) bool { return strings.HasPrefix(order, localPrefix) }

// placeLimit is within what time a stick must say what is on it.
const placeLimit = time.Minute

// Install is an update from a folder or a file of the owner's: a repository as
// "deimos release publish" makes it, or that of a release alone, on a stick, or a tar
// archive of one. version is "" for the newest there. It takes the same path as an order
// and returns the same errors; a repeat with the same id goes on with it.
func (s *Service) Install(ctx context.Context, id, place, version string, tell func(wire.Progress)) (wire.Outcome, error) {
	j := job{order: LocalOrder(id), version: version, local: place, tell: tell}
	limited, cancel := context.WithTimeout(ctx, placeLimit)
	source, end, err := repo.OpenPlace(limited, place)
	cancel()
	if ctx.Err() != nil {
		return wire.Outcome{}, ctx.Err() // it comes again
	}
	if err != nil {
		err = wire.RejectedBecause(wire.CodeNotFound, "%v", err)
		s.noteRefusal(j, err)
		return wire.Outcome{}, err
	}
	defer end()
	j.source = source
	out, err := s.carryOut(ctx, j)
	var p *wire.Problem
	if errors.As(err, &p) {
		s.noteRefusal(j, p)
	}
	return out, err
}

// Decline ends the owner's wish with this id, which is not carried out.
func (s *Service) Decline(id, version string, why *wire.Problem) {
	s.noteRefusal(job{order: LocalOrder(id), version: version}, why)
}

// noteRefusal notes how a wish ended that may not even have begun.
func (s *Service) noteRefusal(j job, err error) {
	if e := s.mem.get().Ended; e != nil && e.Order == j.order {
		return
	}
	note := func(r *Record) {
		r.end(s.o.Now(), j.order, j.version, wire.ProblemOf(err))
	}
	if err := s.mem.leave(note); err != nil {
		s.o.Log.Warn("how the update ended cannot be noted", "error", err)
	}
}

// newest is the newest release of a stick that this device can take from it. The
// metadata names all that there ever were, and the stick may have the files of one.
func (s *Service) newest(ctx context.Context, client *repo.Client, j job, me bundle.Device) (m bundle.Manifest, err error) {
	var versions []string
	for _, name := range client.Targets() {
		if v, ok := repo.TargetVersion(name); ok && (!bundle.Prerelease(v) || bundle.Prerelease(me.Version)) {
			versions = append(versions, v)
		}
	}
	slices.SortFunc(versions, func(a, b string) int { return bundle.Compare(b, a) })
	err = wire.RejectedBecause(wire.CodeNotFound, "there is no release in %s, but for pre-releases, which are installed only if you name one with --version; publish one first", j.local)
	for i, v := range versions {
		if i > 0 && bundle.Compare(v, me.Version) <= 0 {
			break // why the newer ones are not taken says more
		}
		found, why := client.Manifest(ctx, repo.TargetName(v))
		if why == nil {
			_, _, why = found.For(me)
		}
		if why == nil || !passedOver(why) {
			return found, why
		}
		s.o.Log.Info("a release on the stick is passed over", "version", v, "reason", why)
		if i == 0 {
			err = why
		}
	}
	return bundle.Manifest{}, err
}

// passedOver tells of a reason not to take a release for which an older one may be taken.
func passedOver(err error) bool {
	var e *repo.Error
	return errors.As(err, &e) && e.Condition == repo.Missing || errors.Is(err, bundle.ErrBoard) || errors.Is(err, bundle.ErrPlatform) || errors.Is(err, bundle.ErrFrom)
}

// Known tells whether what became of the owner's wish with this id is known: it ended,
// or is on trial.
func (s *Service) Known(id string) bool {
	if s.mem.get().Heard == LocalOrder(id) {
		return true
	}
	if s.how == nil {
		return false
	}
	t, last, err := s.how.standing()
	return err == nil && (t != nil && t.running && t.order == LocalOrder(id) || last != nil && last.Order == LocalOrder(id))
}

// Record is what is remembered of the newest update.
func (s *Service) Record() Record { return s.mem.get() }
