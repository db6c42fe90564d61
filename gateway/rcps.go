package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Why the gateway ends a link of its own accord.
var (
	errLinkRemoved = errors.New("the rcp's record was changed or removed")
	errSilent      = errors.New("the peers stream is silent")
	errNoRecord    = errors.New("no record names this rcp: see rcp add")
)

// links holds the channels to first hops: RCPs that we dial, and RCPs and
// nodes that dial us. Each has its own goroutines; a dead one delays none.
type links struct {
	s *Server

	mu      sync.Mutex
	records map[string]*store.RCP // by name, as last read
	joining map[string]bool       // by name: a join code is open
	hops    map[wire.ID][]*hopConn
	inbound map[wire.ID]*channel.Link // of parties that dial us
	pending map[wire.KeyHash]*pendingConn
	retries map[string]context.CancelFunc // by name: dial now
	trouble map[string]string             // by name: why a pending one cannot be connected
	addr    net.Addr                      // of the listener
}

// hopConn is one connection of class admin to a first hop, of which there are
// two for a moment when it is replaced.
type hopConn struct {
	conn *channel.Conn
	link *channel.Link // with those of class session
	// takeOver ends the reading of peers on this connection, because a newer
	// one does it.
	takeOver context.CancelFunc
}

// pendingConn is a party without a certificate that we have a channel to.
type pendingConn struct {
	conn *channel.Conn
	rcp  string // name of the record by which we dialled it; empty: it dialled us
}

func newLinks(s *Server) *links {
	return &links{s: s, records: make(map[string]*store.RCP), hops: make(map[wire.ID][]*hopConn),
		inbound: make(map[wire.ID]*channel.Link), retries: make(map[string]context.CancelFunc), trouble: make(map[string]string), pending: make(map[wire.KeyHash]*pendingConn)}
}

// Run dials every RCP that has an address, answers those that dial us, and
// follows the records.
func (l *links) Run(ctx context.Context) error {
	wakes, cancel := l.s.bus.Subscribe(bus.RCPs)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	if l.s.cfg.ChannelListen != "" {
		if err := l.listen(ctx, g); err != nil {
			return err
		}
	}
	g.Go(func() error {
		running := map[dialTarget]context.CancelCauseFunc{}
		for {
			if err := l.reload(ctx); err != nil && ctx.Err() == nil {
				l.s.log.Error("rcp records not read", "error", err)
			}
			wanted := l.targets(slices.Collect(maps.Keys(running)))
			for t, stop := range running {
				if !slices.Contains(wanted, t) {
					stop(errLinkRemoved)
					delete(running, t)
				}
			}
			for _, t := range wanted {
				if running[t] == nil {
					one, stop := context.WithCancelCause(ctx)
					running[t] = stop
					g.Go(func() error { l.dial(one, t); return nil })
				}
			}
			select {
			case <-ctx.Done():
				return nil
			case <-wakes:
			case <-time.After(targetSweep): // leaves and join codes expire
			}
		}
	})
	return g.Wait()
}

// reload reads the records and tells the fleet.
func (l *links) reload(ctx context.Context) error {
	list, err := l.s.store.RCPs(ctx)
	if err != nil {
		return fmt.Errorf("load rcps: %w", err)
	}
	joining, err := l.s.enrolment.joiningRCPs(ctx)
	if err != nil {
		return fmt.Errorf("load join codes: %w", err)
	}
	l.mu.Lock()
	old := l.records
	l.joining = joining
	l.records = make(map[string]*store.RCP, len(list))
	for _, r := range list {
		l.records[r.Name] = r
	}
	l.mu.Unlock()
	ids := map[wire.ID]bool{}
	for _, r := range list {
		if r.PartyID == "" {
			continue
		}
		ids[r.PartyID] = true
		l.s.fleet.learn(rcpRecord(r))
		if r.Via == "" {
			l.s.fleet.expect(r.PartyID, wire.RoleRCP, r.Name, r.Address)
		}
		if r.State == api.RCPRevoked {
			l.s.cutParty(r.PartyID)
			l.cut(r.PartyID, identity.ErrRevoked)
		}
	}
	for _, r := range old {
		if r.PartyID != "" && !ids[r.PartyID] {
			l.s.cutParty(r.PartyID)
			l.cut(r.PartyID, errLinkRemoved)
			l.s.fleet.unexpect(r.PartyID)
			l.s.fleet.forget(r.PartyID)
		}
	}
	return nil
}

// rcpRecord gives the fleet what the database says. An RCP that is not known
// to have failed is taken for connected until the grace period is over: if it
// is not, that is news.
func rcpRecord(r *store.RCP) record {
	rec := record{ID: r.PartyID, Role: wire.RoleRCP, Name: r.Name, State: wire.StateRunning, Reason: r.StateReason, Since: r.StateSince, LastSeen: r.LastSeen}
	switch r.State {
	case api.RCPFailed:
		rec.State, rec.Alarmed = wire.StateDown, true
	case api.RCPPending, api.RCPConnecting:
		rec.State = wire.StatePending
	case api.RCPRevoked:
		rec.State, rec.Revoked = wire.StateRevoked, "revoked"
	}
	return rec
}

func (l *links) recordOf(id wire.ID) *store.RCP {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if r.PartyID == id {
			return r
		}
	}
	return nil
}

// listen answers RCPs and nodes that dial us.
func (l *links) listen(ctx context.Context, g *errgroup.Group) error {
	listener, err := channel.Listen(channel.ListenConfig{
		Addr: string(l.s.cfg.ChannelListen), Identity: l.s.id, AllowDownstream: true, AllowEnroll: true,
		Admit: l.admit, Log: l.s.log,
	})
	if err != nil {
		return fmt.Errorf("SALLYPORT_GATEWAY_CHANNEL_LISTEN: %w", err)
	}
	l.mu.Lock()
	l.addr = listener.Addr()
	l.mu.Unlock()
	l.s.log.Info("listening for rcps and nodes", "address", listener.Addr().String())
	g.Go(func() error {
		err := listener.Run(ctx, l.accept)
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	return nil
}

// ChannelAddr is where RCPs and nodes can dial us; nil if they cannot.
func (s *Server) ChannelAddr() net.Addr {
	s.links.mu.Lock()
	defer s.links.mu.Unlock()
	return s.links.addr
}

// admit decides who may dial us, beyond the table of protocols and roles.
func (l *links) admit(peer identity.Peer, _ string) error {
	switch {
	case peer.Pending, peer.Party.Role == wire.RoleNode:
		return nil // one waits for a certificate, the other for a session
	case peer.Party.Role == wire.RoleRCP:
		if r := l.recordOf(peer.Party.ID); r == nil {
			return fmt.Errorf("%w (its UUID is %s)", errNoRecord, peer.Party.ID)
		}
		return nil
	}
	return fmt.Errorf("a %s has no business here", peer.Party.Role)
}

// accept owns a connection of a party that dialled us.
func (l *links) accept(ctx context.Context, c *channel.Conn) {
	if c.Enrolling() {
		l.servePending(ctx, c, "")
		return
	}
	id := c.Peer().Party.ID
	l.mu.Lock()
	link := l.inbound[id]
	if link == nil {
		link = channel.NewLink(l.s.log)
		l.inbound[id] = link
	}
	detach := link.Attach(c)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		detach()
		if len(link.Conns()) == 0 && l.inbound[id] == link {
			delete(l.inbound, id)
		}
	}()
	if c.Class() != channel.ClassAdmin { // asked for by the link, which uses it
		select {
		case <-c.Done():
		case <-ctx.Done():
		}
		return
	}
	l.serve(ctx, c, "", link)
}

// serve owns one verified connection of class admin until it has ended. name
// is the record by which we dialled it; empty if it dialled us.
func (l *links) serve(ctx context.Context, c *channel.Conn, name string, link *channel.Link) {
	switch {
	case c.Enrolling():
		l.servePending(ctx, c, name)
	case c.Peer().Party.Role == wire.RoleRCP:
		l.serveRCP(ctx, c, name, link)
	case c.Peer().Party.Role == wire.RoleNode && name == "":
		l.serveNode(ctx, c, link)
	default:
		l.s.log.Warn("a party of an unexpected role answers", "rcp", name, "peer", c.Peer().String())
	}
}

func (l *links) servePending(ctx context.Context, c *channel.Conn, name string) {
	key := c.Peer().Key
	p := &pendingConn{conn: c, rcp: name}
	l.mu.Lock()
	l.pending[key] = p
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.pending[key] == p {
			delete(l.pending, key)
		}
	}()
	select {
	case l.s.fleet.arrived <- key:
	default: // the sweep finds it
	}
	select {
	case <-c.Done():
	case <-ctx.Done():
	}
}

// serveRCP reads the peers of an RCP while its connection lives.
func (l *links) serveRCP(ctx context.Context, c *channel.Conn, name string, link *channel.Link) {
	id := c.Peer().Party.ID
	rec, err := l.pin(ctx, name, c.Peer())
	if err != nil {
		l.s.log.Warn("rcp not taken", "rcp", name, "peer", c.Peer().String(), "error", err)
		return
	}
	reading, stop := context.WithCancel(ctx)
	defer stop()
	leave := l.enter(id, c, link, stop)
	defer leave()
	l.s.fleet.linkUp(linkInfo{ID: id, Role: wire.RoleRCP, Name: rec.Name, Carrier: c.Carrier(), Address: c.RemoteAddr(), Dialled: c.Dialled(), Since: c.Since(), RTT: c.RTT})
	if err := l.s.hooks.hop(reading, id); err != nil {
		l.s.log.Warn("rcp not used", "rcp", rec.Name, "error", err)
		return
	}
	l.s.log.Info("rcp connected", "rcp", rec.Name, "id", id, "carrier", c.Carrier(), "address", c.RemoteAddr(), "dialled", c.Dialled())
	pause := time.Second
	for reading.Err() == nil && c.Err() == nil {
		began := time.Now()
		err := l.s.readPeers(reading, c, id)
		switch {
		case reading.Err() != nil || c.Err() != nil:
		case errors.Is(err, errSilent):
			c.Close(err) // nothing reports "connected" on a dead path
		default:
			if time.Since(began) > time.Minute {
				pause = time.Second
			}
			l.s.log.Warn("peers stream ended", "rcp", rec.Name, "error", err, "retry_in", pause)
			select {
			case <-time.After(pause):
			case <-reading.Done():
			case <-c.Done():
			}
			pause = min(2*pause, time.Minute)
		}
	}
	// A newer connection reads the peers; this one lives on for its streams.
	select {
	case <-c.Done():
	case <-ctx.Done():
	}
}

// pin returns the record of a connected RCP. The first certified one that
// answers for a pending record is it from then on.
func (l *links) pin(ctx context.Context, name string, peer identity.Peer) (*store.RCP, error) {
	id := peer.Party.ID
	if r := l.recordOf(id); r != nil && (name == "" || r.Name == name) {
		return r, nil
	}
	if name == "" {
		return nil, errNoRecord
	}
	var rec *store.RCP
	err := l.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if other, err := tx.RCPByID(ctx, id); err == nil && other.Name != name {
			return fmt.Errorf("rcp %s answers at the address of rcp %s", other.Name, name)
		}
		if rec, err = tx.RCP(ctx, name); err != nil {
			return err
		}
		if rec.PartyID == id {
			return nil
		}
		if rec.PartyID != "" {
			return fmt.Errorf("%w: the record is pinned to %s", channel.ErrWrongPeer, rec.PartyID)
		}
		rec.PartyID, rec.KeyHash, rec.State, rec.StateReason, rec.StateSince = id, peer.Key, api.RCPConnecting, "", tx.Now()
		// Its key is one that was certified: an RCP that then stays away until its
		// leaf has ended is renewed by it.
		if _, err := tx.Key(ctx, peer.Key); errors.Is(err, store.ErrNotFound) {
			k := &store.Key{KeyHash: peer.Key, Role: wire.RoleRCP, PartyID: id, Name: name, IssuedAt: tx.Now(), NotAfter: peer.Leaf.NotAfter}
			if err := tx.PutKey(ctx, k); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		tx.Audit(ctx, "rcp.pin", name, "it answered at "+rec.Address+" with a certificate of ours: "+string(id))
		return tx.SaveRCP(ctx, rec)
	})
	if err != nil {
		return nil, err
	}
	return rec, l.reload(ctx)
}

// enter registers a connection as the newest of its first hop. The function
// that it returns takes it out again.
func (l *links) enter(id wire.ID, c *channel.Conn, link *channel.Link, takeOver context.CancelFunc) (leave func()) {
	h := &hopConn{conn: c, link: link, takeOver: takeOver}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, old := range l.hops[id] {
		old.takeOver()
	}
	l.hops[id] = append(l.hops[id], h)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.hops[id] = slices.DeleteFunc(l.hops[id], func(o *hopConn) bool { return o == h })
		if len(l.hops[id]) > 0 {
			return
		}
		delete(l.hops, id)
		cause := "the channel ended"
		if err := c.Err(); err != nil {
			cause = err.Error()
		}
		// Under the lock: a connection that comes now must be told after this.
		l.s.fleet.linkDown(id, cause)
	}
}

// conns are the live connections of class admin to a first hop.
func (l *links) conns(id wire.ID) (out []*channel.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.hops[id] {
		if h.conn.Err() == nil {
			out = append(out, h.conn)
		}
	}
	return out
}

// cut ends all connections to a first hop.
func (l *links) cut(id wire.ID, cause error) {
	l.mu.Lock()
	conns := slices.Clone(l.hops[id])
	l.mu.Unlock()
	for _, h := range conns {
		h.conn.Close(cause)
	}
}

// connect opens a stream to authority through a first hop, on a connection of
// class session.
func (l *links) connect(ctx context.Context, id wire.ID, authority string) (net.Conn, error) {
	return l.connectWith(ctx, id, authority, nil)
}

func (l *links) connectWith(ctx context.Context, id wire.ID, authority string, h http.Header) (net.Conn, error) {
	link := l.link(id)
	if link == nil {
		return nil, ErrNotConnected
	}
	return link.Connect(ctx, authority, h)
}

// lane opens a lane to a node through a first hop, or to a first hop that is
// the node itself: of bare legs, or of sealed ones.
func (l *links) lane(ctx context.Context, id, node wire.ID, sealed bool) (net.Conn, error) {
	link := l.link(id)
	if link == nil {
		return nil, ErrNotConnected
	}
	admin := link.Admin()
	if admin == nil {
		return nil, ErrNotConnected
	}
	if node == id {
		node = "" // the peer itself
	}
	conn, err := admin.OpenLane(ctx, wire.LaneRequest{Node: node, Sealed: sealed})
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// link returns the live connections to a first hop; nil if there are none.
func (l *links) link(id wire.ID) *channel.Link {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range slices.Backward(l.hops[id]) {
		if h.conn.Err() == nil {
			return h.link
		}
	}
	return nil
}
