package panel

import "time"

// State is what the light shows.
type State string

// The states of the light, by rising precedence.
const (
	Online   State = "online"   // lit, and blinks off shortly every 5 s
	Working  State = "working"  // lit, and blinks off shortly every second
	Trouble  State = "trouble"  // dark, and flashes three times every 2.5 s
	Waiting  State = "waiting"  // for claim: on for a second, off for a second
	Starting State = "starting" // on and off quickly and evenly
	Updating State = "updating" // a long and a short flash
)

// identify is shown over all of them: dark, with a fast double flash.
const identify State = "identify"

// Longest is how long a light that is driven stays on or dark at most.
const Longest = 5 * time.Second

const ms = time.Millisecond

// patterns are how long the light is on, off, on, off …, over and over. People
// tell them apart by what differs most: mostly lit, even, or mostly dark, and
// how many flashes in a row; never by small differences of speed alone. No step
// is too short to be seen, nor long enough to look steady.
var patterns = map[State][]time.Duration{
	Online:   {4800 * ms, 200 * ms},
	Working:  {850 * ms, 150 * ms},
	Trouble:  {150 * ms, 200 * ms, 150 * ms, 200 * ms, 150 * ms, 1650 * ms},
	Waiting:  {1000 * ms, 1000 * ms},
	Starting: {250 * ms, 250 * ms},
	Updating: {900 * ms, 250 * ms, 200 * ms, 650 * ms},
	identify: {80 * ms, 120 * ms, 80 * ms, 420 * ms},
}
