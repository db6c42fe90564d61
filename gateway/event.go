package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// A transaction takes what came while the last one was written, up to
	// outboxBatch lines or outboxBytes, so that it grows with the load.
	outboxBatch = 1000
	outboxBytes = 4 << 20
	// outboxIdle: an outbox that is empty this long is closed. A signal opens
	// it again; the session stays warm meanwhile.
	outboxIdle = 300 * time.Millisecond
	// outboxSlice ends a pull that never becomes idle, so that other nodes
	// behind the same RCP get their turn.
	outboxSlice = 20 * time.Second
	// While other nodes behind the same first hop wait for their turn, a pull ends
	// after outboxTurn, or when the outbox is empty for outboxHurry.
	outboxTurn  = 500 * time.Millisecond
	outboxHurry = 20 * time.Millisecond
	// outboxGrace is how long a node may take to end its side.
	outboxGrace = 5 * time.Second
)

// errOutbox says that a node breaks the rules of its outbox.
var errOutbox = errors.New("broken outbox")

// pullOutbox takes events from a node until its outbox is empty. What it
// acknowledges is on disk; what is not acknowledged, the node sends again.
func (s *Server) pullOutbox(ctx context.Context, t task) (again want, delay time.Duration) {
	if t.role != wire.RoleNode {
		return 0, 0
	}
	if s.room.holds(t.id, time.Now()) {
		s.metrics.visits.WithLabelValues("outbox", "held").Inc()
		return wantOutbox, 2 * s.room.every
	}
	var left int64
	err := s.sessions.Do(ctx, s.party(t.role, t.id), func(ctx context.Context, c *conversation) (err error) {
		left, err = s.drainOutbox(ctx, c, func() bool { return s.fleet.crowded(choreOutbox, t) })
		return err
	})
	switch {
	case ctx.Err() != nil:
		return 0, 0
	case err != nil:
		s.metrics.visits.WithLabelValues("outbox", "failed").Inc()
		s.log.Debug("outbox not pulled", "node", t.id, "name", t.name, "error", err)
		return wantOutbox, s.fleet.t.hintEvery * 5
	}
	s.metrics.visits.WithLabelValues("outbox", "ok").Inc()
	s.fleet.contact(t.id)
	if left > 0 {
		return wantOutbox, 0
	}
	return 0, 0
}

// outboxLine is one line of a node, or the end of its stream.
type outboxLine struct {
	up   wire.OutboxUp
	size int
	err  error
}

// drainOutbox runs one POST /v1/outbox. It returns how many events are left.
// crowded tells whether others wait for their turn.
func (s *Server) drainOutbox(ctx context.Context, c *conversation, crowded func() bool) (left int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	down, body := io.Pipe()
	defer func() { _ = body.Close() }()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.party.ServerName()+wire.PathOutbox, down)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	answer := time.AfterFunc(sessionAnswer, func() { cancel(c.mute()) })
	res, err := c.RoundTrip(req)
	if err != nil {
		answer.Stop()
		return 0, fmt.Errorf("open outbox: %w", because(ctx, err))
	}
	defer func() { _ = res.Body.Close() }()
	if err := refusal(res); err != nil {
		answer.Stop()
		return 0, fmt.Errorf("open outbox: %w", err)
	}

	lines := newIntake[outboxLine](outboxBatch, outboxBytes)
	reader := wire.NewLineReader(res.Body, wire.MaxFrameLine)
	read := make(chan struct{})
	go func() { // ends with the body, which we close before we return
		defer close(read)
		for {
			var l outboxLine
			l.err = reader.Next(&l.up)
			if e := l.up.Event; e != nil {
				l.size = len(e.Text) + len(e.Key) + len(e.Object) + 256
			}
			if !lines.put(ctx, l, l.size, l.err != nil) || l.err != nil {
				return
			}
		}
	}()
	defer func() { cancel(nil); _ = res.Body.Close(); <-read }()

	p := &pull{s: s, node: c.party.ID, down: body, crowded: crowded, stuck: func() {
		err := c.mute()
		cancel(err)
		_ = body.CloseWithError(err) // ends the write that waits
		_ = c.rt.Close()             // nothing else ends what waits for the stream below
	}}
	return p.run(ctx, lines, answer, cancel)
}

// pull is the state of one POST /v1/outbox.
type pull struct {
	s     *Server
	node  wire.ID
	down  *io.PipeWriter
	stuck func() // gives the session up: its other end reads nothing
	// crowded tells whether other nodes wait for their turn.
	crowded func() bool
	spool   string
	last    wire.OutboxState
	mark    int64 // on disk
	told    int64 // of it, what the node knows
	batch   []wire.OutboxUp
}

// state answers a state with the watermark of its spool.
func (p *pull) state(ctx context.Context, st wire.OutboxState) error {
	mark, err := p.s.store.Watermark(ctx, p.node, st.Spool)
	if err != nil {
		return fmt.Errorf("look up spool %s: %w", wire.Quotable(st.Spool), err)
	}
	p.spool, p.last, p.mark, p.told = st.Spool, st, mark, mark
	return p.send(wire.OutboxDown{Watermark: &wire.OutboxMark{Spool: st.Spool, Seq: mark}})
}

func (p *pull) send(d wire.OutboxDown) error {
	b, err := wire.AppendLine(nil, d)
	if err != nil {
		return err
	}
	defer time.AfterFunc(sessionAnswer, p.stuck).Stop()
	if _, err := p.down.Write(b); err != nil {
		return fmt.Errorf("write to outbox: %w", err)
	}
	return nil
}

// run stores and acknowledges until the node ends the stream, the outbox is
// idle, or the time slice is over. answer is stopped by the first line.
func (p *pull) run(ctx context.Context, lines *intake[outboxLine], answer *time.Timer, cancel context.CancelCauseFunc) (left int64, err error) {
	defer answer.Stop()
	idle := time.NewTimer(outboxIdle)
	defer idle.Stop()
	slice := time.NewTimer(outboxSlice)
	defer slice.Stop()
	turn := time.NewTicker(outboxTurn)
	defer turn.Stop()
	ending := false
	end := func() {
		// Ending our side asks the node to end its own, after what is under way.
		if !ending && p.spool != "" {
			ending = true
			_ = p.down.Close()
			time.AfterFunc(outboxGrace, func() { cancel(fmt.Errorf("%w: the node does not end it", errOutbox)) })
		}
	}
	for {
		select {
		case <-lines.news:
			answer.Stop()
			if ending && p.s.room.holds(p.node, time.Now()) { // what still comes is not acknowledged, and sent again
				return p.left(), nil
			}
			err := p.collect(ctx, lines.take())
			if cerr := p.commit(ctx, ending); cerr != nil {
				return p.left(), cerr
			}
			if p.s.room.holds(p.node, time.Now()) {
				end()
			}
			if errors.Is(err, io.EOF) {
				return p.left(), nil
			}
			if err != nil {
				return p.left(), fmt.Errorf("outbox: %w", err)
			}
			if p.crowded() {
				idle.Reset(outboxHurry)
			} else {
				idle.Reset(outboxIdle)
			}
		case <-idle.C:
			end()
		case <-slice.C:
			end()
		case <-turn.C:
			if p.crowded() {
				end()
			}
		case <-ctx.Done():
			if ending { // it was ours to end; nothing is lost
				return p.left(), nil
			}
			return p.left(), context.Cause(ctx)
		}
	}
}

// left is how many events the node still has to keep, as far as it was told: what
// was stored after we ended our side is told by the next pull.
func (p *pull) left() int64 { return max(p.last.Next-1, p.mark) - p.told }

// collect takes lines into the batch. The error is why there will be no more.
func (p *pull) collect(ctx context.Context, lines []outboxLine) error {
	for _, l := range lines {
		switch {
		case l.err != nil:
			return l.err
		case l.up.State != nil:
			if err := p.restate(ctx, *l.up.State); err != nil {
				return err
			}
		case p.spool == "":
			return fmt.Errorf("%w: its first line is no state", errOutbox)
		case l.up.Event != nil || l.up.Gap != nil:
			p.batch = append(p.batch, l.up)
		}
	}
	return nil
}

// restate takes over a later state: the same spool with new numbers, or a new
// spool, because our watermark showed that the old one had been turned back.
func (p *pull) restate(ctx context.Context, st wire.OutboxState) error {
	if st.Spool == "" {
		return fmt.Errorf("%w: a spool without a name", errOutbox)
	}
	if st.Spool == p.spool {
		p.last = st
		return nil
	}
	if p.spool != "" {
		if err := p.commit(ctx, false); err != nil {
			return err
		}
	}
	return p.state(ctx, st)
}

// commit stores the batch in one transaction and acknowledges it after that.
func (p *pull) commit(ctx context.Context, silent bool) error {
	if len(p.batch) == 0 {
		return nil
	}
	began := time.Now()
	stored, err := p.s.store.StoreOutbox(ctx, p.node, p.spool, p.batch)
	if err != nil {
		return err
	}
	p.s.metrics.batches.Observe(time.Since(began).Seconds())
	p.count(stored)
	if stored.New > 0 { // duplicates take nothing
		p.s.room.took(p.node, costOf(p.batch)*int64(stored.New)/int64(len(p.batch)), time.Now())
	}
	clear(p.batch)
	p.batch = p.batch[:0]
	p.mark = max(p.mark, stored.Ack)
	if silent { // our side is closed; the next watermark acknowledges it
		return nil
	}
	p.told = p.mark
	return p.send(wire.OutboxDown{Ack: &wire.OutboxMark{Spool: p.spool, Seq: stored.Ack}})
}

func (p *pull) count(st store.Stored) {
	p.s.metrics.events.WithLabelValues("new").Add(float64(st.New))
	p.s.metrics.events.WithLabelValues("duplicate").Add(float64(st.Duplicates))
	p.s.metrics.events.WithLabelValues("conflict").Add(float64(st.Conflicts))
}
