package store

import (
	"context"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// States of an event.
const (
	eventOpen   = "open"
	eventAcked  = "acknowledged"
	eventClosed = "closed"
)

// Event is one event as it was stored, or one head that others were merged
// into by their key. Spool and Node are joined in by the reading queries.
type Event struct {
	bun.BaseModel `bun:"table:events"`
	Pos           int64 `bun:",pk"`
	ID            wire.ID
	SpoolRef      int64
	Seq           int64
	NodeID        wire.ID
	Time          time.Time
	ReceivedAt    time.Time
	Severity      wire.Severity
	Application   string
	Object        string
	Key           string
	Text          string
	Instance      string
	State         string
	Count         int
	MergedInto    wire.ID
	ChangedAt     time.Time `bun:",nullzero"`
	ChangedBy     string
	Spool         string `bun:",scanonly"`
	Node          string `bun:",scanonly"`
}

// Annotation is a remark of an operator on an event.
type Annotation struct {
	bun.BaseModel `bun:"table:annotations"`
	Pos           int64 `bun:",pk"`
	EventID       wire.ID
	Time          time.Time
	ByWhom        string
	Text          string
}

// Gap says that the events [FromSeq, ToSeq] of a spool will never come.
type Gap struct {
	bun.BaseModel `bun:"table:gaps"`
	Pos           int64 `bun:",pk"`
	NodeID        wire.ID
	Spool         string
	FromSeq       int64
	ToSeq         int64
	Reason        string
	Time          time.Time
}

// EventFilter selects events. Those that were merged into another are left out
// unless Merged is set. With Ascending, events after After come in the order
// of positions; else newest first, below Before if it is not 0.
type EventFilter struct {
	NodeID        wire.ID
	Severity      wire.Severity
	State, Key    string
	Since         time.Time // received
	Merged        bool
	Own           bool // of the gateway itself, whatever nodes send under its keys
	Ascending     bool
	After, Before int64
	Limit         int
}

func (r Queries) selectEvents(model any) *bun.SelectQuery {
	return r.q.NewSelect().Model(model).ColumnExpr("event.*").
		ColumnExpr("coalesce(s.spool, '') AS spool").ColumnExpr("coalesce(n.name, '') AS node").
		Join("LEFT JOIN spools AS s ON s.ref = event.spool_ref").
		Join("LEFT JOIN nodes AS n ON n.id = event.node_id")
}

// Events lists events.
func (r Queries) Events(ctx context.Context, f EventFilter) ([]Event, error) {
	var out []Event
	q := r.selectEvents(&out).Limit(int64(f.Limit))
	if !f.Merged {
		q.Where("event.merged_into = ''")
	}
	if f.NodeID != "" {
		q.Where("event.node_id = ?", f.NodeID)
	}
	if f.Severity != "" {
		q.Where("event.severity = ?", f.Severity)
	}
	if f.State != "" {
		q.Where("event.state = ?", f.State)
	}
	if f.Own {
		q.Where("event.spool_ref = ?", internalSpool)
	}
	if f.Key != "" {
		q.Where("event.key = ?", f.Key)
	}
	if !f.Since.IsZero() {
		q.Where("event.received_at >= ?", f.Since.UTC())
	}
	if f.Ascending {
		q.Where("event.pos > ?", f.After).OrderExpr("event.pos")
	} else {
		if f.Before != 0 {
			q.Where("event.pos < ?", f.Before)
		}
		q.OrderExpr("event.pos DESC")
	}
	return out, q.Scan(ctx)
}

// FindEvents returns the events whose ID is, or begins with, ref.
func (r Queries) FindEvents(ctx context.Context, ref string, limit int) ([]Event, error) {
	var out []Event
	if ref == "" || strings.Trim(ref, "0123456789abcdef-") != "" {
		return out, nil
	}
	// '~' sorts after every character of a UUID, in every collation of ASCII.
	err := r.selectEvents(&out).Where("event.id >= ?", ref).Where("event.id <= ?", ref+"~").OrderExpr("event.id").Limit(int64(limit)).Scan(ctx)
	return out, err
}

// Annotations lists the remarks on an event, oldest first.
func (r Queries) Annotations(ctx context.Context, event wire.ID) ([]Annotation, error) {
	var out []Annotation
	err := r.q.NewSelect().Model(&out).Where("event_id = ?", event).OrderExpr("pos").Scan(ctx)
	return out, err
}

// Gaps lists what a node lost, newest first.
func (r Queries) Gaps(ctx context.Context, node wire.ID) ([]Gap, error) {
	var out []Gap
	err := r.q.NewSelect().Model(&out).Where("node_id = ?", node).OrderExpr("pos DESC").Scan(ctx)
	return out, err
}

// Position returns the highest position that was committed.
func (r Queries) Position(ctx context.Context) (pos int64, err error) {
	err = r.q.NewRaw("SELECT value FROM counters WHERE name = 'pos'").Scan(ctx, &pos)
	return pos, err
}

// SetEventState acknowledges or closes an event.
func (tx *Tx) SetEventState(ctx context.Context, id wire.ID, state string) error {
	tx.Wake(bus.Events)
	return one(tx.q.NewRaw("UPDATE events SET state = ?, changed_at = ?, changed_by = ? WHERE id = ?", state, tx.now, ActorFrom(ctx).Who, id).Exec(ctx))
}

// Annotate adds a remark to an event.
func (tx *Tx) Annotate(ctx context.Context, id wire.ID, text string) {
	tx.notes = append(tx.notes, Annotation{EventID: id, Time: tx.now, ByWhom: ActorFrom(ctx).Who, Text: text})
	tx.Wake(bus.Events)
}

// Internal is an event that the gateway raises itself. NodeID is empty when it
// is not about a node. With a Key, a good event (normal) closes the bad one
// and the other way round.
type Internal struct {
	NodeID   wire.ID
	Severity wire.Severity
	Object   string
	Key      string
	Text     string
}

// InternalApplication is the application of the gateway's own events.
const InternalApplication = "sallyport"

// internalSpool is the ref of the spool of the gateway's own events.
const internalSpool = 0

// Raise stores an internal event with this transaction.
func (tx *Tx) Raise(in Internal) { tx.raised = append(tx.raised, in) }

// Raise stores an internal event in a transaction of its own.
func (db *DB) Raise(ctx context.Context, in Internal) error {
	return db.Update(ctx, func(_ context.Context, tx *Tx) error { tx.Raise(in); return nil })
}
