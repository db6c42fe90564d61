package wire

import (
	"fmt"
	"time"
)

// Severity of an event, rising.
type Severity string

// The severities.
const (
	SeverityNormal   Severity = "normal"
	SeverityWarning  Severity = "warning"
	SeverityMinor    Severity = "minor"
	SeverityMajor    Severity = "major"
	SeverityCritical Severity = "critical"
)

// Severities in rising order.
var Severities = []Severity{SeverityNormal, SeverityWarning, SeverityMinor, SeverityMajor, SeverityCritical}

// ParseSeverity accepts exactly the five names.
func ParseSeverity(s string) (Severity, error) {
	for _, v := range Severities {
		if string(v) == s {
			return v, nil
		}
	}
	return "", fmt.Errorf("unknown severity %q (want normal, warning, minor, major or critical)", Quotable(s))
}

// Event is one message of a node. (node, spool, seq) is its place; ID is its
// name, and decides when a place is claimed twice.
type Event struct {
	ID          ID        `json:"id"`
	Seq         int64     `json:"seq"` // from 1, without holes but those that a Gap names
	Time        time.Time `json:"time"`
	Severity    Severity  `json:"severity"`
	Application string    `json:"application,omitempty"`
	Object      string    `json:"object,omitempty"`
	Key         string    `json:"key,omitempty"` // events with one key are one event to an operator; empty: never merged
	Text        string    `json:"text"`
	Instance    string    `json:"instance,omitempty"` // policy that raised it
}

// Validate refuses an event that breaks a limit.
func (e Event) Validate() error {
	if _, err := ParseSeverity(string(e.Severity)); err != nil {
		return err
	}
	if e.Text == "" {
		return fmt.Errorf("event has no text")
	}
	if len(e.Text) > MaxEventText {
		return fmt.Errorf("event text of %d bytes is above the limit of %d", len(e.Text), MaxEventText)
	}
	for _, f := range []struct{ name, value string }{{"application", e.Application}, {"object", e.Object}, {"key", e.Key}, {"instance", e.Instance}} {
		if len(f.value) > MaxEventField {
			return fmt.Errorf("event %s of %d bytes is above the limit of %d", f.name, len(f.value), MaxEventField)
		}
	}
	return nil
}

// Gap says that the events [From, To] of a spool will never come.
type Gap struct {
	From   int64  `json:"from"`
	To     int64  `json:"to"`
	Reason string `json:"reason"` // quota, lost, truncated
}

// OutboxState describes a spool.
type OutboxState struct {
	Spool   string    `json:"spool"` // random, made with the spool
	First   int64     `json:"first"` // lowest seq kept; Next when empty
	Next    int64     `json:"next"`  // seq of the next event
	Depth   int64     `json:"depth"`
	Oldest  time.Time `json:"oldest,omitzero"`
	Dropped int64     `json:"dropped"` // by quota, since the spool was made
}

// OutboxDown is one line that the gateway sends. The first is the watermark:
// the highest seq of Spool that the gateway has on disk, 0 for none; the rest
// are acknowledgements.
type OutboxDown struct {
	Watermark *OutboxMark `json:"watermark,omitempty"`
	Ack       *OutboxMark `json:"ack,omitempty"`
}

// OutboxMark is a position in a spool: everything up to Seq is on disk.
type OutboxMark struct {
	Spool string `json:"spool"`
	Seq   int64  `json:"seq"`
}

// OutboxUp is one line that the node sends: exactly one member is set. The
// first line is State, sent before the watermark is awaited, so that the
// gateway knows which spool to look up; another State follows when the
// watermark made the node start a new spool.
type OutboxUp struct {
	State *OutboxState `json:"state,omitempty"`
	Event *Event       `json:"event,omitempty"`
	Gap   *Gap         `json:"gap,omitempty"`
}
