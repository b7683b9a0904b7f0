package wire

import "time"

// Severity says how much a warning matters.
type Severity string

// From least to most.
const (
	Info     Severity = "info"     // good to know; nothing to do today
	Trouble  Severity = "trouble"  // works, but somebody should look
	Critical Severity = "critical" // does not work, or data is in danger
)

// MaxWarnings is how many warnings travel in a heartbeat.
const MaxWarnings = 16

// Warning is something that is wrong with a device, as it sees itself. Code and
// Subject together tell one from another.
type Warning struct {
	Code     string    `json:"code"`              // stable, lower_snake_case
	Subject  string    `json:"subject,omitempty"` // what it is about, such as a disk
	Severity Severity  `json:"severity"`
	Title    string    `json:"title"` // a few words
	Text     string    `json:"text"`  // what happened and what to do, for a person
	Since    time.Time `json:"since"`
}

// Identify has a device show which one it is, by its light. Zero seconds ends it.
type Identify struct {
	Seconds int `json:"seconds"` // at most MaxIdentify
}

// MaxIdentify is how long a device shows itself at most, in seconds.
const MaxIdentify = 3600

// InventoryReport is the body of a SUCCEEDED device.inventory; the inventory
// itself, in the JSON of hw.Inventory, is the attachment.
type InventoryReport struct {
	Digest string `json:"digest"` // hw.Inventory.Digest
}

// HistoryRequest asks for what a device has measured.
type HistoryRequest struct {
	From   time.Time `json:"from,omitzero"`    // zero: as far back as there is
	To     time.Time `json:"to,omitzero"`      // zero: until now
	Points int       `json:"points,omitempty"` // at most so many a curve; 0: 240
	Series []string  `json:"series,omitempty"` // names, or beginnings that end in "*"; none: all
}

// MaxPoints is how many points a curve has at most.
const MaxPoints = 2000

// History is what a device has measured, evenly spaced. It is the attachment,
// in JSON, of a SUCCEEDED device.history.
type History struct {
	From   time.Time        `json:"from"`
	Step   float64          `json:"step"`  // seconds
	Count  int              `json:"count"` // points of each curve; point i is over [From+i·Step, From+(i+1)·Step)
	Series map[string]Curve `json:"series"`

	LeftOut []string `json:"left_out,omitempty"` // series that would have made this too large; ask for them by name, or for fewer points
}

// Curve is one measured value over time. A point is null where nothing was
// measured. Min and Max are left out if they are everywhere the same as Mean.
type Curve struct {
	Unit string     `json:"unit,omitempty"`
	Mean []*float64 `json:"mean"`
	Min  []*float64 `json:"min,omitempty"`
	Max  []*float64 `json:"max,omitempty"`
}
