// Package health keeps what is wrong with a device: one registry of warnings,
// which feeds the status command, the heartbeat and the light.
package health

import (
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Code names a kind of warning; see kinds.go.
type Code string

// Kind is what is known of a warning beforehand.
type Kind struct {
	Code     Code
	Severity wire.Severity
	Title    string        // a few words
	Todo     string        // what a person does about it
	After    time.Duration // it must last so long before a person sees it
	Hides    []Code        // kinds that follow from this one and are not shown beside it
}

// Registry holds the warnings of a device. Safe for concurrent use.
type Registry struct{}

// New makes a registry that knows the kinds of this package.
func New(now func() time.Time) *Registry { return &Registry{} }

// Set says that something is so. detail is a sentence for a person; a repeat
// keeps the time since when it is so. The code must be known.
func (r *Registry) Set(c Code, subject, detail string) {}

// Clear says that it is no longer so.
func (r *Registry) Clear(c Code, subject string) {}

// Is is Set or Clear.
func (r *Registry) Is(c Code, subject string, so bool, detail string) {}

// Only clears all of a kind whose subject is not among subjects.
func (r *Registry) Only(c Code, subjects ...string) {}

// Visible is what a person should see, the worst first.
func (r *Registry) Visible() []wire.Warning { return nil }

// Changed is closed when what is visible may have changed; ask again for the next.
func (r *Registry) Changed() <-chan struct{} { return nil }
