// Package wire is the language that a device and its coordinator speak: ids,
// topics, orders, reports and the signed envelopes that carry them. It imports
// no other room of this module; every other room may import it.
//
// # Parties and keys
//
//   - A device owns one Ed25519 key, made at its first start and never copied.
//     The key signs what the device says ([Report], [Presence], [Beat]) and is
//     the key of its TLS client certificate. [DeviceID] is derived from it, so
//     an id can be checked against a key without asking anybody.
//   - A coordinator owns one Ed25519 order-signing key. It signs what the
//     coordinator says ([Order], [Ack], [Welcome]). A device learns the public
//     half when it enrols ([EnrolRequest]), over a TLS connection whose authority
//     is pinned by the fleet token, or was seen first and is in the claim code
//     ([ClaimCode]).
//   - Release keys sign firmware. They are not used here: see ota/repo.
//
// # What travels
//
// Every message is one DSSE envelope (https://github.com/secure-systems-lab/dsse)
// in JSON, at most [MaxMessage] bytes. The payload type says what is inside, and
// is covered by the signature, so that a report cannot be replayed as an order.
//
//	topic                        from         payload
//	deimos/1/<device>/order      coordinator  Order, Ack or Welcome
//	deimos/1/<device>/report     device       Report
//	deimos/1/<device>/beat       device       Beat
//	deimos/1/<device>/presence   device       Presence (hello, and the last will)
//
// The broker between them is trusted with nothing but delivery: it can drop,
// delay, repeat and reorder. For orders and reports none of that has an effect
// beyond lateness; a repeated beat or hello can make a device look online that
// is not, and nothing else (see [Presence.Instance]).
//
// # Life of an order
//
//	QUEUED → RUNNING → SUCCEEDED | FAILED | REJECTED | TIMED_OUT | CANCELED
//
// Delivery is at least once and effect exactly once. The coordinator keeps an
// order and sends it again until the device's signed terminal [Report] has
// arrived. The device keeps that report until the order expires, answers every
// repeat from it, and sends it again until an [Ack] names it; one Ack names many.
// Reports are numbered ([Report.Seq]). Of those that are not terminal, a lower
// number never overwrites a higher one, and all may be left out; the first
// terminal one always counts, also of a device whose count began anew because its
// journal was lost, and is final.
//
// Which of two orders goes first is in [Kind.Priority]. An order is taken back by
// another one, [OrderCancel], and ends by its own report all the same. A device
// whose outbox is full may give up a report's content ([Report.Dropped]), never
// its state; what it gave up is counted in [Presence.Dropped].
//
// # Configuration and time
//
// What the fleet wants of a device's settings is one order with all of them and a
// version ([ConfigApply]); the table of settings is [Settings], and the owner's
// limits, which always win, are known to the device alone. The [Welcome] gives
// the time over the hello's nonce; until then a device says in every message how
// little it trusts its clock ([Confidence]).
//
// Unknown fields are ignored, so that either side can be newer. An unknown kind
// of order is answered with REJECTED and the code [CodeUnknownKind].
package wire

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strings"
)

// MaxMessage is the largest envelope either side sends over MQTT, in bytes.
// What is larger goes over HTTPS (see [Attachment]).
const MaxMessage = 128 << 10

// DeviceID names a device for life: the lower-case base32 (RFC 4648, no
// padding) of the first 15 bytes of SHA-256 over the raw Ed25519 public key,
// 24 letters.
type DeviceID string

const deviceIDLen = 24

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// IDOf derives the id that belongs to a public key.
func IDOf(key ed25519.PublicKey) DeviceID {
	sum := sha256.Sum256(key)
	return DeviceID(idEncoding.EncodeToString(sum[:15]))
}

// ParseDeviceID checks that s has the form of a device id. It cannot tell
// whether such a device exists.
func ParseDeviceID(s string) (DeviceID, error) {
	if len(s) != deviceIDLen {
		return "", fmt.Errorf("%q is no device id: it must have %d letters, has %d", s, deviceIDLen, len(s))
	}
	if !inAlphabet(s) {
		return "", fmt.Errorf("%q is no device id: only a-z and 2-7 are used", s)
	}
	return DeviceID(s), nil
}

// inAlphabet tells whether s has only letters of ids. The decoder alone would
// pass over line breaks.
func inAlphabet(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// Channel is the last level of a topic.
type Channel string

// The four channels of a device.
const (
	ChannelOrder    Channel = "order"
	ChannelReport   Channel = "report"
	ChannelBeat     Channel = "beat"
	ChannelPresence Channel = "presence"
)

// Topic is the MQTT topic of one channel of one device.
func Topic(d DeviceID, c Channel) string {
	return "deimos/1/" + string(d) + "/" + string(c)
}

// Subject is the same channel as a NATS subject; NATS maps one to the other.
// An empty device stands for all of them (the wildcard "*").
func Subject(d DeviceID, c Channel) string {
	if d == "" {
		d = "*"
	}
	return "deimos.1." + string(d) + "." + string(c)
}

// ParseSubject takes a NATS subject apart again.
func ParseSubject(s string) (DeviceID, Channel, error) {
	p := strings.Split(s, ".")
	if len(p) != 4 || p[0] != "deimos" || p[1] != "1" {
		return "", "", fmt.Errorf("%q is no Deimos subject", s)
	}
	d, err := ParseDeviceID(p[2])
	if err != nil {
		return "", "", err
	}
	return d, Channel(p[3]), nil
}
