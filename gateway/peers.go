package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

const (
	// peersSilence is two missed keep-alives and a little.
	peersSilence = 35 * time.Second
	// What one RCP may make the fleet work, in units of one simple line: a
	// snapshot of a full RCP fits, an endless one is slowed down.
	peersRate  = 20_000
	peersBurst = 20_000
	// badLines ends a stream that holds more nonsense than a newer protocol
	// would bring.
	badLines = 1000
	// signalRate bounds the lines of a node that hangs on us (DESIGN section 3).
	signalRate = 10
)

var errNonsense = errors.New("too many lines that break the rules")

// readPeers follows the peers stream of an RCP once, from where the last one
// ended, and tells the fleet.
func (s *Server) readPeers(ctx context.Context, c *channel.Conn, id wire.ID) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(peersSilence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	path := wire.PathPeers
	if epoch, pos := s.fleet.resume(id); pos > 0 {
		path += "?" + url.Values{"epoch": {epoch}, "pos": {strconv.FormatInt(pos, 10)}}.Encode()
	}
	lines, end, err := openLines(ctx, c, path, wire.MaxPeersLine)
	if err != nil {
		return because(ctx, fmt.Errorf("open peers stream: %w", err))
	}
	defer end()
	pace := rate.NewLimiter(peersRate, peersBurst)
	bad := 0
	greeted := false
	for {
		var line wire.PeersLine
		err := lines.Next(&line)
		switch {
		case errors.Is(err, wire.ErrMalformed):
			err = fmt.Errorf("%w: %w", errBadLine, err)
		case err != nil:
			return because(ctx, fmt.Errorf("read peers stream: %w", err))
		case line.Hello != nil:
			greeted = true
			if err := s.fleet.peersHello(id, *line.Hello); err != nil {
				s.fleet.unsync(id)
				return err
			}
		case !greeted:
			return fmt.Errorf("%w: a peers stream begins with a hello", errBadLine)
		default:
			err = s.fleet.apply(id, line)
		}
		watchdog.Reset(peersSilence)
		if err != nil {
			s.metrics.lines.WithLabelValues("refused").Inc()
			if bad++; bad == 1 || bad == badLines {
				s.log.Warn("line of a peers stream dropped", "rcp", id, "error", err, "so_far", bad)
			}
			if bad >= badLines {
				s.fleet.unsync(id)
				return errNonsense
			}
		} else {
			s.metrics.lines.WithLabelValues("ok").Inc()
		}
		if err := pace.WaitN(ctx, min(s.fleet.cost(line), peersBurst)); err != nil {
			return because(ctx, err)
		}
	}
}

// because prefers the reason for which we ended something to what that looked
// like.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// openLines asks a downstream peer for a stream of lines that lasts until ctx
// or the channel ends.
func openLines(ctx context.Context, rt http.RoundTripper, path string, limit int) (*wire.LineReader, func(), error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://peer"+path, nil)
	if err != nil {
		return nil, nil, err
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	end := func() { _ = res.Body.Close() }
	if err := refusal(res); err != nil {
		end()
		return nil, nil, err
	}
	return wire.NewLineReader(res.Body, limit), end, nil
}

// cost is the work that a line makes, in simple lines: some look at every
// member of the fleet.
func (f *fleet) cost(line wire.PeersLine) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := 1 + len(f.members)/50
	switch {
	case line.Hello != nil, line.Synced:
		return all
	case line.Peer != nil && line.Peer.Role == wire.RoleRCP:
		return all
	case line.Gone != nil:
		if m := f.members[line.Gone.ID]; m != nil && m.role == wire.RoleRCP {
			return all
		}
	}
	return 1
}

// unsync makes the next peers stream of a first hop begin with a snapshot.
func (f *fleet) unsync(id wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.links[id]; l != nil {
		l.pos, l.synced = 0, false
	}
}

// serveNode is for a node that hangs on us directly: we are its first hop, and
// read its signals.
func (l *links) serveNode(ctx context.Context, c *channel.Conn, link *channel.Link) {
	peer := c.Peer()
	id := peer.Party.ID
	reading, stop := context.WithCancel(ctx)
	defer stop()
	leave := l.enter(id, c, link, stop)
	defer leave()
	if len(l.conns(id)) > 1 { // for a moment, unless they are of two
		l.s.clones.suspect(id, "", doubtTwo)
	}
	l.s.fleet.linkUp(linkInfo{ID: id, Role: wire.RoleNode, Name: peer.Name, Carrier: c.Carrier(), Address: c.RemoteAddr(), Dialled: c.Dialled(), Since: c.Since(), RTT: c.RTT})
	pause := time.Second
	for reading.Err() == nil && c.Err() == nil {
		err := l.s.readSignals(reading, c, id)
		if reading.Err() != nil || c.Err() != nil {
			break
		}
		l.s.log.Debug("signals ended", "node", id, "error", err, "retry_in", pause)
		select {
		case <-time.After(pause):
		case <-reading.Done():
		case <-c.Done():
		}
		pause = min(2*pause, time.Minute)
	}
	select {
	case <-c.Done():
	case <-ctx.Done():
	}
}

// readSignals follows the signals of a node that hangs on us.
func (s *Server) readSignals(ctx context.Context, c *channel.Conn, id wire.ID) error {
	lines, end, err := openLines(ctx, c, wire.PathSignals, wire.MaxSignalLine)
	if err != nil {
		return fmt.Errorf("open signals: %w", err)
	}
	defer end()
	pace := rate.NewLimiter(signalRate, 2*signalRate)
	for {
		var sig wire.Signal
		if err := lines.Next(&sig); err != nil {
			return fmt.Errorf("read signals: %w", err)
		}
		s.fleet.signal(id, sig)
		if err := pace.Wait(ctx); err != nil {
			return err
		}
	}
}

// signal takes over a hint of a node that hangs on us. A line that names
// another node is of no interest.
func (f *fleet) signal(id wire.ID, sig wire.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || sig.ID != id {
		return
	}
	w := m.ways[wayKey(id, nil)]
	if w == nil || !w.gone.IsZero() {
		return
	}
	w.draining = sig.Draining
	f.hint(m, w, sig.Digest, sig.Hints)
}

// hint acts on what a party claims about itself by way of w.
func (f *fleet) hint(m *member, w *way, digest string, hints []string) {
	w.digest = clip(digest)
	w.outbox = slices.Contains(hints, wire.HintOutbox)
	if w.digest != "" && w.digest != m.digest && w.digest != w.asked {
		w.asked = w.digest
		f.want(m, wantNews, true)
	}
	if w.outbox {
		f.want(m, wantOutbox, true)
	}
	if slices.Contains(hints, wire.HintAction) {
		f.want(m, wantActions, true)
	}
	if f.onParked != nil && m.role == wire.RoleNode && m.known && m.revoked == "" && slices.Contains(hints, wire.HintParked) {
		f.onParked(m.id, w.link)
	}
}
