package rcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// fakeLink is a channel that answers with canned bodies and notes what it is
// asked.
type fakeLink struct {
	peer    identity.Peer
	remote  string
	answer  func(*http.Request) (*http.Response, error)
	closing func() // what closing it takes: I/O, perhaps

	mu    sync.Mutex
	asked []string
	err   error
	done  chan struct{}
}

func newFake(peer identity.Peer, remote string) *fakeLink {
	return &fakeLink{peer: peer, remote: remote, done: make(chan struct{})}
}

func nodePeer(id wire.ID) identity.Peer {
	return identity.Peer{Party: wire.Party{Role: wire.RoleNode, ID: id}, Key: wire.HashSPKI([]byte(id))}
}

func rcpPeer(id wire.ID) identity.Peer {
	return identity.Peer{Party: wire.Party{Role: wire.RoleRCP, ID: id}, Key: wire.HashSPKI([]byte(id))}
}

func pendingPeer(n int) identity.Peer {
	return identity.Peer{Pending: true, Key: wire.HashSPKI(fmt.Append(nil, n))}
}

func (f *fakeLink) Peer() identity.Peer   { return f.peer }
func (f *fakeLink) Carrier() string       { return "h2" }
func (f *fakeLink) Dialled() bool         { return false }
func (f *fakeLink) RemoteAddr() string    { return f.remote }
func (f *fakeLink) Since() time.Time      { return time.Time{} }
func (f *fakeLink) RTT() time.Duration    { return 0 }
func (f *fakeLink) Done() <-chan struct{} { return f.done }
func (f *fakeLink) Stay(func()) bool      { return false }

func (f *fakeLink) note(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, s)
}

func (f *fakeLink) notes() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string{}, f.asked...)
}

func (f *fakeLink) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeLink) Close(cause error) {
	if f.closing != nil {
		f.closing()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = cause
		if cause == nil {
			f.err = io.ErrClosedPipe
		}
		close(f.done)
	}
}

func (f *fakeLink) Drain(_ context.Context, d wire.Drain) error {
	f.note("POST " + wire.PathDrain)
	f.Close(errReplaced)
	return nil
}

func (f *fakeLink) Forward(_ http.ResponseWriter, _ *http.Request, authority string, _ http.Header) (bool, error) {
	f.note("CONNECT " + authority)
	return false, io.ErrUnexpectedEOF
}

func (f *fakeLink) OpenLane(context.Context, wire.LaneRequest) (channel.LaneConn, error) {
	f.note("POST " + wire.PathLanes)
	return nil, io.ErrUnexpectedEOF
}

func (f *fakeLink) RoundTrip(req *http.Request) (*http.Response, error) {
	f.note(req.Method + " " + req.URL.RequestURI())
	if f.answer == nil {
		return nil, io.ErrUnexpectedEOF
	}
	return f.answer(req)
}

type retired struct {
	mu  sync.Mutex
	all []*attached
}

func (r *retired) add(a *attached) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, a)
}

func testRoster(maxPending, perSource int) (*roster, *retired) {
	gone := &retired{}
	return newRoster(newTable(1000, 100), maxPending, perSource, gone.add), gone
}

func mustJoin(t *testing.T, r *roster, l link) *attached {
	t.Helper()
	a, err := r.join(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func published(r *roster, id wire.ID) wire.Peer {
	return r.table.truth()[peerKey{target: target{id: id}}]
}

func TestNewestChannelWins(t *testing.T) {
	r, gone := testRoster(10, 10)
	id := wire.NewID()
	say := func(a *attached, boot string, gen int64, digest string) {
		t.Helper()
		if err := r.signal(a, wire.Signal{ID: id, Boot: boot, Generation: gen, Digest: digest}); err != nil {
			t.Fatal(err)
		}
	}
	a := mustJoin(t, r, newFake(nodePeer(id), "10.0.0.1:1"))
	say(a, "boot1", 5, "a")
	b := mustJoin(t, r, newFake(nodePeer(id), "10.0.0.1:2"))
	if got := published(r, id); got.Digest != "a" || r.channels(a.target())[0] != a {
		t.Errorf("before the newer channel has spoken: %+v", got)
	}
	say(b, "boot1", 4, "b") // late: it is the older one
	if got := published(r, id); got.Digest != "a" || len(gone.all) != 1 || gone.all[0] != b {
		t.Errorf("an older generation that comes later: %+v, retired %d", got, len(gone.all))
	}
	say(b, "boot1", 4, "b2") // replayed or stale: ignored
	if got := published(r, id); got.Digest != "a" {
		t.Errorf("a replaced channel still speaks for the node: %+v", got)
	}
	dead := newFake(nodePeer(id), "10.0.0.1:3")
	dead.closing = func() { // a peer that reads nothing must hold up nobody else
		if !r.mu.TryLock() {
			t.Error("a channel is closed, which may block, with the roster locked")
			return
		}
		r.mu.Unlock()
	}
	c := mustJoin(t, r, dead)
	say(c, "boot1", 6, "c")
	if got := published(r, id); got.Digest != "c" || got.Generation != 6 || len(gone.all) != 2 || gone.all[1] != a {
		t.Errorf("a newer generation: %+v, retired %d", got, len(gone.all))
	}
	d := mustJoin(t, r, newFake(nodePeer(id), "10.0.0.1:4"))
	say(d, "boot2", 1, "d") // after a reboot, generations begin again
	if got := published(r, id); got.Digest != "d" {
		t.Errorf("another boot: %+v", got)
	}
	if !errors.Is(dead.err, errRestarted) || len(gone.all) != 2 {
		t.Errorf("the channel of the process that is gone: closed by %v, want %v and no drain", dead.err, errRestarted)
	}
	r.leave(d, "cut")
	if got := published(r, id); got.ID != id {
		t.Error("the node is gone although older channels live")
	}
	for _, x := range []*attached{a, b, c} {
		r.leave(x, "cut")
	}
	if _, ok := r.table.truth()[peerKey{target: target{id: id}}]; ok {
		t.Error("the node is still published without a channel")
	}
	if len(r.live) != 0 {
		t.Errorf("%d parties left in the roster", len(r.live))
	}
}

// TestCopiesOfOneProcessTakeTurns: they have one boot and count their channels
// from the same number on. Whatever the other one has counted to, each that
// comes is shown to the gateway.
func TestCopiesOfOneProcessTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, gone := testRoster(10, 10)
		id := wire.NewID()
		for n, generation := range []int64{205, 6, 206, 7, 207, 207, 8, 8} {
			time.Sleep(raceTime)
			a := mustJoin(t, r, newFake(nodePeer(id), fmt.Sprintf("10.0.0.%d:1", n)))
			if err := r.signal(a, wire.Signal{ID: id, Boot: "boot1", Generation: generation}); err != nil {
				t.Fatal(err)
			}
			if got := published(r, id); got.Generation != generation || r.channels(a.target())[0] != a || len(gone.all) != n {
				t.Errorf("channel %d of generation %d: %+v is shown, %d were drained", n, generation, got, len(gone.all))
			}
		}
	})
}

func TestSignalsThatLieCutTheChannel(t *testing.T) {
	r, _ := testRoster(10, 10)
	id, other := wire.NewID(), wire.NewID()
	mustJoin(t, r, newFake(nodePeer(other), "10.0.0.2:1"))
	before := published(r, other)
	for name, s := range map[string]wire.Signal{
		"another's uuid": {ID: other, Boot: "b", Generation: 1},
		"no uuid":        {Boot: "b", Generation: 1},
		"endless boot":   {ID: id, Boot: strings.Repeat("b", 65)},
		"endless digest": {ID: id, Digest: strings.Repeat("b", 65)},
		"many hints":     {ID: id, Hints: make([]string, 9)},
		"long hint":      {ID: id, Hints: []string{strings.Repeat("h", 33)}},
	} {
		a := mustJoin(t, r, newFake(nodePeer(id), "10.0.0.1:1"))
		if err := r.signal(a, s); !errors.Is(err, errForged) {
			t.Errorf("%s: %v, want errForged", name, err)
		}
		r.leave(a, "cut")
	}
	if now := published(r, other); now.Boot != before.Boot || now.Generation != before.Generation {
		t.Errorf("the other node changed: %+v", now)
	}
	a := mustJoin(t, r, newFake(nodePeer(id), "10.0.0.1:1"))
	if err := r.signal(a, wire.Signal{ID: id, Boot: "b", Generation: 1}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []wire.Signal{{ID: id, Boot: "b", Generation: 2}, {ID: id, Boot: "c", Generation: 1}} {
		if err := r.signal(a, s); !errors.Is(err, errForged) {
			t.Errorf("%+v after (b, 1) on the same channel: %v", s, err)
		}
	}
}

func TestPartyWithTooManyChannelsLosesItsOldest(t *testing.T) {
	r, _ := testRoster(10, 10)
	id := wire.NewID()
	links := make([]*fakeLink, maxChannels+1)
	for i := range links {
		links[i] = newFake(nodePeer(id), "10.0.0.1:1")
		mustJoin(t, r, links[i])
	}
	if !errors.Is(links[0].Err(), errTooMany) || links[1].Err() != nil {
		t.Errorf("oldest: %v, next: %v", links[0].Err(), links[1].Err())
	}
}

func TestPendingLimits(t *testing.T) {
	r, _ := testRoster(6, 3)
	var joined []*attached
	for i := range 3 {
		joined = append(joined, mustJoin(t, r, newFake(pendingPeer(i), fmt.Sprintf("10.0.0.1:%d", i+1))))
	}
	if _, err := r.join(t.Context(), newFake(pendingPeer(3), "10.0.0.1:9")); !errors.Is(err, errPendingFrom) {
		t.Errorf("fourth from one address: %v", err)
	}
	if _, err := r.join(t.Context(), newFake(pendingPeer(3), "[::ffff:10.0.0.1]:9")); !errors.Is(err, errPendingFrom) {
		t.Errorf("the same address written as IPv6: %v", err)
	}
	for i := range 3 {
		mustJoin(t, r, newFake(pendingPeer(10+i), fmt.Sprintf("[2001:db8:1:2::%d]:1", i+1)))
	}
	// A seventh takes the place of the one that waits longest behind the address
	// with most of them.
	crowded := mustJoin(t, r, newFake(pendingPeer(30), "10.9.9.9:1"))
	if err := joined[0].conn.(*fakeLink).Err(); !errors.Is(err, errCrowded) || len(r.channels(joined[0].target())) != 0 {
		t.Errorf("who gave way: %v", err)
	}
	if _, ok := r.table.truth()[peerKey{target: joined[0].target()}]; ok {
		t.Error("who gave way is still in the table")
	}
	r.leave(joined[0], "left") // its channel ends: nothing is counted twice
	// Who comes from that very address, or from one with almost as many, does not.
	if _, err := r.join(t.Context(), newFake(pendingPeer(31), "10.0.0.1:9")); !errors.Is(err, errPendingTotal) {
		t.Errorf("seventh, from an address with 2 of 6: %v", err)
	}
	r.leave(crowded, "left")
	if _, err := r.join(t.Context(), newFake(pendingPeer(20), "[2001:db8:1:2:ffff::1]:1")); !errors.Is(err, errPendingFrom) {
		t.Errorf("fourth of one /64: %v", err)
	}
	mustJoin(t, r, newFake(pendingPeer(20), "[2001:db8:1:3::1]:1"))

	// The same key again takes the place of its first channel, at the limit too.
	first := joined[1].conn.(*fakeLink)
	again := mustJoin(t, r, newFake(pendingPeer(1), "10.0.0.1:77"))
	if !errors.Is(first.Err(), errReplaced) || r.channels(again.target())[0] != again {
		t.Errorf("the first channel of the key: %v", first.Err())
	}
	r.leave(joined[1], "replaced")
	if _, ok := r.table.truth()[peerKey{target: again.target()}]; !ok {
		t.Error("the key is gone from the table with its first channel")
	}
	if _, n := r.count(); n != 6 {
		t.Errorf("%d pending, want 6", n)
	}
}

// A party whose request an operator is shown keeps its place, whoever comes: strangers from
// as many addresses as they like push out each other.
func TestRequestedPartiesKeepTheirPlace(t *testing.T) {
	r, _ := testRoster(8, 6)
	var plant []*attached // more than anybody else, behind one address
	for i := range 4 {
		a := mustJoin(t, r, newFake(pendingPeer(i), fmt.Sprintf("10.0.0.1:%d", i+1)))
		r.requested(a.target())
		plant = append(plant, a)
	}
	for i := range 100 {
		mustJoin(t, r, newFake(pendingPeer(100+i), fmt.Sprintf("10.1.0.%d:1", i)))
	}
	for i, a := range plant {
		if err := a.conn.(*fakeLink).Err(); err != nil {
			t.Errorf("number %d was pushed out: %v", i, err)
		}
	}
	if _, n := r.count(); n != 8 {
		t.Errorf("%d wait, want 8", n)
	}
	// Half of the places can be kept, not more: there is room for others.
	fifth := mustJoin(t, r, newFake(pendingPeer(20), "10.2.0.1:1"))
	r.requested(fifth.target())
	for i := range 8 {
		mustJoin(t, r, newFake(pendingPeer(300+i), fmt.Sprintf("10.3.0.%d:1", i)))
	}
	if err := fifth.conn.(*fakeLink).Err(); !errors.Is(err, errCrowded) {
		t.Errorf("a fifth of eight keeps its place: %v", err)
	}
	// The key keeps what it has when it comes by another channel, and gives it
	// back when it leaves.
	r.leave(fifth, "left")
	again := mustJoin(t, r, newFake(pendingPeer(0), "10.9.0.1:1"))
	r.leave(plant[0], "replaced")
	if !again.requested || r.kept != 4 {
		t.Errorf("requested %v, %d kept", again.requested, r.kept)
	}
	r.requested(target{key: pendingPeer(999).Key}) // who is not there
	for _, a := range append(plant[1:], again) {
		r.leave(a, "left")
	}
	if r.kept != 0 {
		t.Errorf("%d kept by nobody", r.kept)
	}
	for source, s := range r.sources {
		if s.kept != 0 || len(s.waiting) == 0 {
			t.Errorf("%s: %+v", source, s)
		}
	}
}

// TestClosedListToNodes enumerates what an RCP may send to whom: for every
// method and every path of ours, and a few that are none.
func TestClosedListToNodes(t *testing.T) {
	id, other := wire.NewID(), wire.NewID()
	node, below, pending := nodePeer(id), rcpPeer(id), pendingPeer(1)
	const digest = "0123abcd"
	targets := []string{
		wire.PathSignals, wire.PathLanes, wire.PathArtifacts + digest, wire.PathArtifacts + "../desired", wire.PathDrain, wire.PathPeers, wire.PathPeers + "?pos=1",
		wire.PathChannels, wire.PathHello, wire.PathDesired, wire.PathOutbox, wire.PathActions, wire.PathActionID + "x", wire.PathCSR,
		wire.PathCertificate, wire.PathRevocations, wire.PathUnlock, wire.PathEcho, wire.PathEnroll, "/", "/v1/signals/..", "*", "",
		wire.ConnectAuthority(id), wire.ConnectAuthority(other), wire.PendingAuthority(pending.Key), wire.PendingAuthority(pendingPeer(2).Key),
		"127.0.0.1:22", "example.com:443",
	}
	allowed := map[string][]string{
		"node": {
			"CONNECT " + wire.ConnectAuthority(id), "GET " + wire.PathSignals, "POST " + wire.PathLanes,
			"PUT " + wire.PathArtifacts + digest, "POST " + wire.PathDrain,
		},
		"rcp": {
			"GET " + wire.PathPeers, "GET " + wire.PathPeers + "?pos=1", "POST " + wire.PathDrain, "POST " + wire.PathLanes, "PUT " + wire.PathRevocations,
			"CONNECT " + wire.ConnectAuthority(id), "CONNECT " + wire.ConnectAuthority(other),
			"CONNECT " + wire.PendingAuthority(pending.Key), "CONNECT " + wire.PendingAuthority(pendingPeer(2).Key),
		},
		"pending": {"CONNECT " + wire.PendingAuthority(pending.Key)},
		"gateway": nil,
	}
	peers := map[string]identity.Peer{"node": node, "rcp": below, "pending": pending,
		"gateway": {Party: wire.Party{Role: wire.RoleGateway, ID: id}}}
	for who, peer := range peers {
		want := map[string]bool{}
		for _, s := range allowed[who] {
			want[s] = true
		}
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", ""} {
			for _, tg := range targets {
				if got := mayAsk(peer, method, tg); got != want[method+" "+tg] {
					t.Errorf("to a %s: %s %q: %v, want %v", who, method, tg, got, !got)
				}
			}
		}
	}
	f := newFake(node, "10.0.0.1:1")
	a := &attached{conn: f, peer: node}
	if _, err := a.ask(t.Context(), http.MethodPut, wire.PathDesired, nil); !errors.Is(err, errNotAllowed) {
		t.Errorf("PUT /v1/desired: %v", err)
	}
	if _, err := a.forward(nil, nil, wire.ConnectAuthority(other), nil); !errors.Is(err, errNotAllowed) {
		t.Errorf("CONNECT to another through this node: %v", err)
	}
	if _, err := (&attached{conn: f, peer: pending}).openLane(t.Context(), wire.LaneRequest{}); !errors.Is(err, errNotAllowed) {
		t.Errorf("a lane to a pending party: %v", err)
	}
	if n := f.notes(); len(n) != 0 {
		t.Errorf("the node was asked %v", n)
	}
}
