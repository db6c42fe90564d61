package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// processMemory is what a virtual machine that is copied while it runs has twice, of
// its node.
type processMemory struct {
	boot, salt string
	held       wire.Nonce
	generation int64
}

// resumed is a node that goes on from a memory: its channels are new, whatever
// else it does is what it did. No program can be copied while it runs by a
// test, so this one is made here.
type resumed struct {
	id     *identity.Identity
	stop   func()
	served chan struct{} // holds a wake-up: it was asked

	mu  sync.Mutex
	mem processMemory
}

// resume starts a node with the identity in dir, which must be its own copy.
func resume(t *testing.T, dir string, mem processMemory, addresses ...string) *resumed {
	t.Helper()
	id, err := identity.Open(dir, wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	n := &resumed{id: id, mem: mem, served: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, addr := range addresses {
		d := &channel.Dialer{Addr: addr, Peer: channel.PeerUpstream, Identity: id, Log: slog.New(slog.DiscardHandler)}
		running.Go(func() {
			_ = d.Run(ctx, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, n.handler(c)) })
		})
	}
	n.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(n.stop)
	return n
}

func (n *resumed) memory() processMemory {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mem
}

func (n *resumed) hello() wire.Hello {
	party, _ := n.id.Party()
	mem := n.memory()
	return wire.Hello{Party: party, Boot: mem.boot, Program: "resumed", Versions: wire.OwnVersions, Mode: "managed", State: wire.StateRunning,
		NotAfter: n.id.NotAfter(), RenewAfter: n.id.RenewAfter(), Salt: mem.salt}
}

func (n *resumed) handler(c *channel.Conn) http.Handler {
	n.mu.Lock()
	n.mem.generation++
	began := n.mem
	n.mu.Unlock()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodConnect:
			stream, err := channel.AcceptConnect(w, r)
			if err != nil {
				return
			}
			_ = session.Serve(r.Context(), stream, n.id, http.HandlerFunc(n.session))
		case r.URL.Path == wire.PathSignals:
			line, _ := wire.AppendLine(nil, wire.Signal{ID: n.id.ID(), Boot: wire.UnmarkBoot(began.boot), Generation: began.generation, Digest: n.hello().Digest()})
			_, _ = w.Write(line)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
			case <-c.Done():
			}
		case r.URL.Path == wire.PathDrain:
			w.WriteHeader(http.StatusNoContent)
		default:
			channel.Refuse(w, http.StatusNotFound, "nothing here")
		}
	})
}

func (n *resumed) session(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != wire.PathHello {
		channel.Refuse(w, http.StatusNotFound, "nothing here")
		return
	}
	h := n.hello()
	if brought, err := wire.ParseNonce(r.Header.Get(wire.HeaderNonce)); err == nil {
		n.mu.Lock()
		h.Previous, n.mem.held = n.mem.held, brought
		if r.Header.Get(wire.HeaderMark) == "1" {
			n.mem.boot = wire.MarkBoot(n.mem.boot, brought)
			h.Boot = n.mem.boot
		}
		n.mu.Unlock()
	}
	h.Time = time.Now()
	_ = json.NewEncoder(w).Encode(h)
	select {
	case n.served <- struct{}{}:
	default:
	}
}

// TestCopiedWhileRunning: a virtual machine is copied with its memory, and both
// copies go on with one boot ID at one RCP.
func TestCopiedWhileRunning(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	node.Stop()
	found, err := filepath.Glob(filepath.Join(node.Data, "node", "*", "identity"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%q, %v", found, err)
	}
	dirs := [2]string{site.Path("one"), site.Path("two")}
	for _, dir := range dirs {
		copyTree(t, found[0], dir)
	}
	one := resume(t, dirs[0], processMemory{boot: string(wire.NewID()), salt: "s", held: wire.NewNonce(), generation: 200}, relay.Address)
	<-one.served
	node.WaitState(30*time.Second, "running")
	mem := one.memory()
	mem.generation -= 190 // its snapshot is as old as that
	two := resume(t, dirs[1], mem, relay.Address)
	took := node.WaitState(2*time.Minute, "quarantined")
	t.Logf("two copies of one process at one RCP were found after %v", took)
	var shown api.NodeDetail
	show := gateway.Run("node", "show", "web-1", "-o", "json")
	show.Exits(0)
	show.JSON(&shown)
	boots := map[string]bool{}
	for _, b := range shown.Boots {
		boots[b.ID] = true
	}
	a, b := one.memory().boot, two.memory().boot
	if a == b || !boots[a] || !boots[b] || !strings.Contains(shown.StateReason, a) || !strings.Contains(shown.StateReason, b) || !strings.Contains(shown.StateReason, "copies of one running machine") {
		t.Errorf("the copies have boots %s and %s; quarantined because %s; boots %+v", a, b, shown.StateReason, shown.Boots)
	}
	two.stop()
	gateway.Run("node", "resume", "web-1").Exits(0)
	harness.Eventually(t, 60*time.Second, "the one that is left runs", func() error {
		n, err := gateway.Node("web-1")
		if err == nil && n.State != "running" {
			err = fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
		}
		return err
	})
	harness.Holds(t, 5*time.Second, "it is not found again", func() error {
		if n, err := gateway.Node("web-1"); err != nil || n.State == "quarantined" {
			return errors.Join(err, errors.New(n.StateReason))
		}
		return nil
	})
}
