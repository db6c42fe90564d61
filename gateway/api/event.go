package api

import (
	"time"

	"sallyport/internal/wire"
)

// Event is one line of `event list`. Events with one key are one event to an
// operator: Count says how often it came.
type Event struct {
	ID          wire.ID       `json:"id"`
	Pos         int64         `json:"pos"`
	NodeID      wire.ID       `json:"node_id"` // empty for an event of the gateway about itself or an RCP
	Node        string        `json:"node"`
	Spool       string        `json:"spool"`
	Seq         int64         `json:"seq"`
	Time        time.Time     `json:"time"`     // the node's clock
	Received    time.Time     `json:"received"` // the gateway's clock
	Severity    wire.Severity `json:"severity"`
	Application string        `json:"application"`
	Object      string        `json:"object"`
	Key         string        `json:"key"`
	Text        string        `json:"text"`
	Instance    string        `json:"instance"`
	State       string        `json:"state"`
	Count       int           `json:"count"`
}

// States of an event.
const (
	EventOpen         = "open"
	EventAcknowledged = "acknowledged"
	EventClosed       = "closed"
)

// EventDetail is what `event show` prints.
type EventDetail struct {
	Event
	Annotations []Annotation `json:"annotations"`
	ChangedBy   string       `json:"changed_by"`
	Changed     *time.Time   `json:"changed"`
	ETag        string       `json:"etag"`
}

// Annotation is a remark of an operator.
type Annotation struct {
	Time time.Time `json:"time"`
	By   string    `json:"by"`
	Text string    `json:"text"`
}

// Annotate adds a remark.
type Annotate struct {
	Text string `json:"text"`
}

// EventQuery filters events. Since and Limit as on the command line.
type EventQuery struct {
	Node     string
	Severity string // exactly this one
	State    string
	Key      string
	Since    time.Time
	Merged   bool // also the events that were merged into another by their key
	Page
}
