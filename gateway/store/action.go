package store

import (
	"context"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// Action is one program to be run once on one node.
type Action struct {
	bun.BaseModel `bun:"table:actions"`
	ID            wire.ID `bun:",pk"`
	Seq           int64   // order in which they were asked for
	Batch         string
	BatchKey      string // who asked, and the idempotency key of the call
	Tenant        string
	NodeID        wire.ID
	NodeName      string
	Command       []string
	TTL           time.Duration `bun:"ttl"`
	Timeout       time.Duration
	State         string
	Code          string // one of the ActionCode* of package api
	Reason        string
	ExitCode      *int
	Signal        int
	Truncated     bool
	Cancelling    bool // an operator asked for its end
	CreatedAt     time.Time
	CreatedBy     string
	ExpiresAt     time.Time `bun:",nullzero"` // zero: TTL is 0
	SentAt        time.Time `bun:",nullzero"`
	StartedAt     time.Time `bun:",nullzero"`
	EndedAt       time.Time `bun:",nullzero"`
}

// Open reports whether the action may still run.
func (a *Action) Open() bool {
	return a.State == wire.ActionQueued || a.State == wire.ActionSent || a.State == wire.ActionRunning
}

// ActionFilter selects actions, newest first, below the seq Before if it is
// not 0.
type ActionFilter struct {
	NodeID       wire.ID
	State, Batch string
	BatchKey     string
	OpenOnly     bool
	Before       int64
	Limit        int // 0: no limit
}

// Actions lists actions.
func (r Queries) Actions(ctx context.Context, f ActionFilter) ([]*Action, error) {
	var out []*Action
	q := r.q.NewSelect().Model(&out).OrderExpr("seq DESC")
	if f.NodeID != "" {
		q.Where("node_id = ?", f.NodeID)
	}
	if f.State != "" {
		q.Where("state = ?", f.State)
	}
	if f.OpenOnly {
		q.Where("state IN ('queued', 'sent', 'running')")
	}
	if f.Batch != "" {
		q.Where("batch = ?", f.Batch)
	}
	if f.BatchKey != "" {
		q.Where("batch_key = ?", f.BatchKey)
	}
	if f.Before != 0 {
		q.Where("seq < ?", f.Before)
	}
	if f.Limit > 0 {
		q.Limit(int64(f.Limit))
	}
	return out, q.Scan(ctx)
}

// Action returns one action.
func (r Queries) Action(ctx context.Context, id wire.ID) (*Action, error) {
	a := new(Action)
	err := r.q.NewSelect().Model(a).Where("id = ?", id).Scan(ctx)
	return a, notFound(err)
}

// FindActions returns the actions whose ID is, or begins with, ref.
func (r Queries) FindActions(ctx context.Context, ref string, limit int) ([]*Action, error) {
	var out []*Action
	if ref == "" || strings.Trim(ref, "0123456789abcdef-") != "" {
		return out, nil
	}
	err := r.q.NewSelect().Model(&out).Where("id >= ?", ref).Where("id <= ?", ref+"~").OrderExpr("id").Limit(int64(limit)).Scan(ctx)
	return out, err
}

// AddActions stores actions in the state queued, in this order.
func (tx *Tx) AddActions(ctx context.Context, actions []*Action) error {
	if len(actions) == 0 {
		return nil
	}
	last, err := tx.next(ctx, "action", int64(len(actions)))
	if err != nil {
		return err
	}
	for i, a := range actions {
		a.Seq, a.State, a.CreatedAt, a.CreatedBy = last-int64(len(actions)-1-i), wire.ActionQueued, tx.now, ActorFrom(ctx).Who
		if a.TTL > 0 {
			a.ExpiresAt = tx.now.Add(a.TTL)
		}
	}
	tx.Wake(bus.Actions)
	_, err = tx.q.NewInsert().Model(&actions).Exec(ctx)
	return err
}

// SaveAction writes a transition of an action that is still open; one that has
// ended never changes again, and [ErrChanged] says so.
func (tx *Tx) SaveAction(ctx context.Context, a *Action) error {
	if !a.Open() && a.EndedAt.IsZero() {
		a.EndedAt = tx.now
	}
	res, err := tx.q.NewUpdate().Model(a).WherePK().Where("state IN ('queued', 'sent', 'running')").
		Column("state", "code", "reason", "exit_code", "signal", "truncated", "sent_at", "started_at", "ended_at").Exec(ctx)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
		return ErrChanged
	}
	tx.Wake(bus.Actions)
	tx.wakeAction(a)
	return nil
}

// wakeAction tells those that follow an action, or its batch.
func (tx *Tx) wakeAction(a *Action) {
	tx.Wake(bus.Action(string(a.ID)))
	tx.Wake(bus.Batch(a.Batch))
}

// CancelAction ends an action that was not sent yet; one that was is marked,
// and ends when its node says so.
func (tx *Tx) CancelAction(ctx context.Context, a *Action, code string) error {
	a.Cancelling = true
	if _, err := tx.q.NewRaw("UPDATE actions SET cancelling = TRUE WHERE id = ?", a.ID).Exec(ctx); err != nil {
		return err
	}
	tx.Wake(bus.Actions)
	if a.State != wire.ActionQueued {
		return nil
	}
	a.State, a.Code, a.Reason = wire.ActionCancelled, code, "cancelled before it was sent, by "+ActorFrom(ctx).Who
	return tx.SaveAction(ctx, a)
}

// actionFrame is one piece of output.
type actionFrame struct {
	bun.BaseModel `bun:"table:action_frames"`
	ActionID      wire.ID `bun:",pk"`
	N             int64   `bun:",pk"`
	Stream        string
	Data          []byte
}

// AddFrames stores pieces of output; those that are there already are left out,
// and those without a byte.
func (tx *Tx) AddFrames(ctx context.Context, a *Action, frames []wire.ActionFrame) error {
	rows := make([]actionFrame, 0, len(frames))
	for _, f := range frames {
		if f.Stream != "" && len(f.Data) > 0 {
			rows = append(rows, actionFrame{ActionID: a.ID, N: f.N, Stream: f.Stream, Data: f.Data})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	tx.wakeAction(a)
	_, err := tx.q.NewInsert().Model(&rows).On("CONFLICT (action_id, n) DO NOTHING").Exec(ctx)
	return err
}

// Frames returns pieces of output above n, in order, at most limit.
func (r Queries) Frames(ctx context.Context, id wire.ID, after int64, limit int) ([]wire.ActionFrame, error) {
	var rows []actionFrame
	err := r.q.NewSelect().Model(&rows).Where("action_id = ?", id).Where("n > ?", after).OrderExpr("n").Limit(int64(limit)).Scan(ctx)
	out := make([]wire.ActionFrame, len(rows))
	for i, f := range rows {
		out[i] = wire.ActionFrame{N: f.N, Stream: f.Stream, Data: f.Data}
	}
	return out, err
}

// Progress is how far an action of a batch is.
type Progress struct {
	ID     wire.ID
	State  string
	Reason string
	N      int64 // last piece of output
}

// Progress returns how far the actions of a batch are: all of it in one query,
// because a batch may be large.
func (r Queries) Progress(ctx context.Context, batch string) (out []Progress, err error) {
	err = r.q.NewRaw(`SELECT a.id, a.state, a.reason, coalesce((SELECT max(f.n) FROM action_frames AS f WHERE f.action_id = a.id), 0) AS n
		FROM actions AS a WHERE a.batch = ? ORDER BY a.seq`, batch).Scan(ctx, &out)
	return out, err
}

// LastFrame returns the number of the last piece of output that is stored.
func (r Queries) LastFrame(ctx context.Context, id wire.ID) (n int64, err error) {
	err = r.q.NewRaw("SELECT coalesce(max(n), 0) FROM action_frames WHERE action_id = ?", id).Scan(ctx, &n)
	return n, err
}

// FrameOverhead is what a piece of output costs beside its data, in bytes: it
// counts, so that a node cannot store any number of tiny ones.
const FrameOverhead = 64

// OutputSize returns how many bytes the stored output of an action takes.
func (r Queries) OutputSize(ctx context.Context, id wire.ID) (size int64, err error) {
	err = r.q.NewRaw("SELECT coalesce(sum(length(data) + ?), 0) FROM action_frames WHERE action_id = ?", FrameOverhead, id).Scan(ctx, &size)
	return size, err
}
