package rcp

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/time/rate"

	"sallyport/internal/wire"
)

// mirrors are the RCPs below us, one each however many channels it has: only
// one channel at a time tells, so that an old line never follows a new one.
type mirrors struct {
	r  *Relay
	mu sync.Mutex
	m  map[wire.ID]*mirror
}

func (ms *mirrors) take(via wire.ID) *mirror {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	m := ms.m[via]
	if m == nil {
		m = &mirror{r: ms.r, via: via, turn: make(chan struct{}, 1)}
		ms.m[via] = m
	}
	m.users++
	return m
}

// release forgets everything behind an RCP whose last channel has gone.
func (ms *mirrors) release(m *mirror) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if m.users--; m.users == 0 {
		delete(ms.m, m.via)
		ms.r.table.dropVia(m.via, nil, "the RCP before it is gone")
	}
}

// mirror copies what an RCP below us says of its peers into our table, with
// that RCP at the head of each path. Nothing it says can touch an entry that is
// not behind it.
type mirror struct {
	r     *Relay
	via   wire.ID
	users int           // channels; under mirrors.mu
	turn  chan struct{} // full while a channel tells

	// Of the channel whose turn it is.
	a     *attached
	epoch string
	pos   int64
	seen  map[peerKey]struct{} // while a snapshot runs: what it named
}

// read follows the peers stream once, from where the last one ended.
func (m *mirror) read(ctx context.Context, a *attached) error {
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-a.conn.Done():
		return a.conn.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
	m.a = a
	path := wire.PathPeers
	if m.epoch != "" {
		path += "?" + url.Values{"epoch": {m.epoch}, "pos": {strconv.FormatInt(m.pos, 10)}}.Encode()
	}
	resp, err := a.ask(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	pace := rate.NewLimiter(peersRate, peersBurst)
	lines := wire.NewLineReader(resp.Body, wire.MaxPeersLine)
	for {
		var l wire.PeersLine
		if err := lines.Next(&l); err != nil {
			return err
		}
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		if err := m.apply(l); err != nil {
			return err
		}
	}
}

func (m *mirror) apply(l wire.PeersLine) error {
	switch {
	case l.Hello != nil:
		return m.hello(*l.Hello)
	case l.Peer != nil:
		if err := m.put(*l.Peer); err != nil {
			return err
		}
	case l.Gone != nil:
		if path, ok := m.path(l.Gone.Path); ok {
			tg := target{l.Gone.ID, l.Gone.Pending}
			delete(m.seen, keyOf(tg, path))
			m.r.table.drop(tg, path, printable(l.Gone.Reason, 200))
		}
	case l.Synced:
		if m.seen != nil {
			m.r.table.dropVia(m.via, m.seen, "not there any more")
			m.seen = nil
		}
	case l.Draining != nil:
		return m.signal(func(s *wire.Signal) { s.Draining = true })
	}
	if l.Pos > 0 {
		m.pos = l.Pos
	}
	return nil
}

// hello says who the RCP is and how the stream goes on. It takes the place of
// a node's signal.
func (m *mirror) hello(h wire.PeersHello) error {
	if len(h.Epoch) > maxBootText {
		return fmt.Errorf("%w: epoch is too long", errForged)
	}
	m.epoch = h.Epoch
	if h.Snapshot {
		m.pos, m.seen = 0, map[peerKey]struct{}{}
	}
	return m.r.roster.signal(m.a, wire.Signal{ID: h.ID, Boot: h.Boot, Generation: h.Generation})
}

func (m *mirror) signal(change func(*wire.Signal)) error {
	m.r.roster.mu.Lock()
	s, ok := m.a.signal, m.a.signalled
	m.r.roster.mu.Unlock()
	if !ok {
		return fmt.Errorf("%w: a line before the hello", errForged)
	}
	change(&s)
	return m.r.roster.signal(m.a, s)
}

// put takes a peer that could be there. What cannot be (a loop through us, too
// many hops, a role that is never downstream) is left out; what no honest RCP
// writes ends the channel.
func (m *mirror) put(p wire.Peer) error {
	if p.Pending != "" {
		if _, err := wire.ParseKeyHash(string(p.Pending)); err != nil || p.ID != "" || p.Role != "" {
			return fmt.Errorf("%w: a pending peer with a name", errForged)
		}
	} else if _, err := wire.ParseID(string(p.ID)); err != nil || p.Role != wire.RoleNode && p.Role != wire.RoleRCP {
		return fmt.Errorf("%w: peer %q of role %q", errForged, wire.Quotable(string(p.ID)), wire.Quotable(string(p.Role)))
	}
	if err := checkHints(p.Boot, p.Digest, p.Hints); err != nil {
		return fmt.Errorf("%w: %w", errForged, err)
	}
	path, ok := m.path(p.Path)
	if !ok || p.ID == m.r.id.ID() || slices.Contains(path, p.ID) {
		return nil
	}
	p.Path = path
	p.Source, p.Carrier = printable(p.Source, 128), printable(p.Carrier, 8)
	if err := m.r.table.put(p); err != nil {
		m.r.metrics.refused.WithLabelValues(refusal(err)).Inc()
		return nil
	}
	if m.seen != nil {
		m.seen[keyOf(target{p.ID, p.Pending}, path)] = struct{}{}
	}
	return nil
}

// path puts the RCP in front of what it said. It is false for a loop, and for
// more RCPs than a CONNECT may pass (we are one of them).
func (m *mirror) path(rest []wire.ID) ([]wire.ID, bool) {
	if len(rest)+2 > wire.MaxHops {
		return nil, false
	}
	path := make([]wire.ID, 0, len(rest)+1)
	for _, id := range append([]wire.ID{m.via}, rest...) {
		if _, err := wire.ParseID(string(id)); err != nil || id == m.r.id.ID() || slices.Contains(path, id) {
			return nil, false
		}
		path = append(path, id)
	}
	return path, true
}
