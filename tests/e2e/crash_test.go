package e2e

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/local"
	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

const (
	crashEvents  = 10_000
	crashSenders = 8
	crashKills   = 4 // of one role, in one run
)

// TestKill kills a role in the middle of 10,000 events, several times: none is
// lost, none is doubled.
func TestKill(t *testing.T) {
	harness.Long(t)
	for _, victim := range []string{"gateway", "rcp", "node"} {
		t.Run(victim, func(t *testing.T) {
			t.Parallel() // with the other two: most of it is waiting for who comes back
			site := harness.New(t)
			gateway := site.Gateway()
			relay := site.RCP(gateway, "dmz-1")
			node := site.Node(gateway, "web-1", tagged("web-1"))
			node.WaitRunning(runningWithin)
			role := map[string]*harness.Role{"gateway": gateway.Role, "rcp": relay.Role, "node": node.Role}[victim]

			received := watch(t, gateway)
			sent := send(t, node, crashEvents)
			for kill := range crashKills {
				// Spread over the run: a fifth, two fifths, ...
				goal := int64(crashEvents * (kill + 1) / (crashKills + 1))
				harness.Eventually(t, 3*time.Minute, fmt.Sprintf("%d events are received", goal), func() error {
					if n := received.count.Load(); n < goal {
						return fmt.Errorf("%d of %d, %d sent", n, goal, sent.acknowledged())
					}
					return nil
				})
				before := received.count.Load()
				role.Kill()
				if before <= 0 || before >= crashEvents {
					t.Fatalf("killed %s with %d events received: the kill proves nothing", victim, before)
				}
				t.Logf("killed %s at %d received", victim, before)
				role.Start()
			}
			sent.wait(t)
			harness.Eventually(t, 3*time.Minute, "all events are received", func() error {
				if n := received.count.Load(); n < crashEvents {
					return fmt.Errorf("%d received, %d acknowledged", n, sent.acknowledged())
				}
				return nil
			})
			verify(t, gateway, sent)
		})
	}
}

// TestKillAll kills every role once in the same run.
func TestKillAll(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	path := site.Path("files/kept")
	gateway.Apply(documents("kept", "name=web-1", path, "last known good")).Exits(0)
	harness.Eventually(t, 10*time.Second, "the policy is applied", node.Applied)

	for _, role := range []*harness.Role{gateway.Role, relay.Role, node.Role} {
		role.Kill()
	}
	node.Start()
	harness.Eventually(t, 10*time.Second, "the node answers without any gateway", func() error {
		return node.Local("status").Err()
	})
	if err := fileHolds(path, "last known good"); err != nil {
		t.Errorf("the node did not keep its state: %v", err)
	}
	node.Local("event", "send", "--severity", "minor", "sent into the dark").Exits(0)
	relay.Start()
	gateway.Start()
	node.WaitRunning(30 * time.Second)
	harness.Eventually(t, 10*time.Second, "the event arrives", func() error { return gateway.HasEvent("sent into the dark") })
	if err := node.Applied(); err != nil {
		t.Error(err)
	}
}

// sending is a stream of events from several local users. Each attempt has a
// text of its own: one whose answer was lost may be on disk or not.
type sending struct {
	mu       sync.Mutex
	acked    map[string]bool // texts that the node said are on disk
	tried    map[string]bool // all others
	next     atomic.Int64
	finished chan struct{}
}

func (s *sending) acknowledged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.acked)
}

func (s *sending) wait(t *testing.T) {
	t.Helper()
	limit := time.NewTimer(3 * time.Minute)
	defer limit.Stop()
	select {
	case <-s.finished:
	case <-limit.C:
		t.Fatalf("only %d of %d events were accepted", s.acknowledged(), crashEvents)
	}
}

// send starts sending until n events were acknowledged.
func send(t *testing.T, node *harness.Node, n int) *sending {
	s := &sending{acked: make(map[string]bool), tried: make(map[string]bool), finished: make(chan struct{})}
	socket := local.SocketPath(node.Data, wire.RoleNode)
	ctx, cancel := context.WithCancel(t.Context())
	var senders sync.WaitGroup
	for range crashSenders {
		senders.Go(func() {
			client := local.NewClient(socket)
			pause := time.NewTicker(5 * time.Millisecond)
			defer pause.Stop()
			for {
				s.mu.Lock()
				enough := len(s.acked) >= n
				s.mu.Unlock()
				if enough || ctx.Err() != nil {
					return
				}
				text := fmt.Sprintf("event %d", s.next.Add(1))
				_, err := client.SendEvent(ctx, local.EventRequest{Severity: wire.SeverityNormal, Text: text})
				s.mu.Lock()
				if err == nil {
					s.acked[text] = true
				} else {
					s.tried[text] = true
				}
				s.mu.Unlock()
				if err != nil {
					// The node is being killed: try again soon.
					select {
					case <-pause.C:
					case <-ctx.Done():
					}
				}
			}
		})
	}
	go func() {
		senders.Wait()
		close(s.finished)
	}()
	t.Cleanup(func() {
		cancel()
		<-s.finished
	})
	return s
}

// watching follows the event stream of a gateway across its restarts.
type watching struct{ count atomic.Int64 }

func watch(t *testing.T, gateway *harness.Gateway) *watching {
	t.Helper()
	client, err := api.NewClient(api.ClientConfig{URL: "unix://" + gateway.Data + "/gateway/api.sock"})
	if err != nil {
		t.Fatal(err)
	}
	w := new(watching)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		again := time.NewTicker(20 * time.Millisecond)
		defer again.Stop()
		var position int64
		for {
			err := client.TailEvents(ctx, api.EventQuery{Node: "web-1"}, position, func(e api.Event) error {
				if e.Pos <= position {
					return fmt.Errorf("position %d after %d", e.Pos, position)
				}
				position = e.Pos
				if len(e.Text) > 6 && e.Text[:6] == "event " {
					w.count.Add(1)
				}
				return nil
			})
			if err != nil && ctx.Err() == nil {
				t.Logf("tail: %v", err)
			}
			select {
			case <-again.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

// verify reads everything that the gateway has: each acknowledged event once,
// each other at most once, and the places in each spool without a hole.
func verify(t *testing.T, gateway *harness.Gateway, sent *sending) {
	t.Helper()
	events, err := gateway.Events("--node", "web-1", "--limit", "0")
	if err != nil {
		t.Fatal(err)
	}
	times := make(map[string]int)
	ids := make(map[wire.ID]bool)
	places := make(map[string]map[int64]bool)
	for _, e := range events {
		if e.NodeID == "" || e.Spool == "" {
			continue // the gateway's own
		}
		times[e.Text]++
		if ids[e.ID] {
			t.Errorf("the id %s is given twice", e.ID)
		}
		ids[e.ID] = true
		if places[e.Spool] == nil {
			places[e.Spool] = make(map[int64]bool)
		}
		if places[e.Spool][e.Seq] {
			t.Errorf("the place %s/%d is taken twice", e.Spool, e.Seq)
		}
		places[e.Spool][e.Seq] = true
	}
	var lost, doubled int
	for text := range sent.acked {
		switch times[text] {
		case 0:
			lost++
		case 1:
		default:
			doubled++
		}
	}
	for text := range sent.tried {
		if times[text] > 1 {
			doubled++
		}
	}
	if lost > 0 || doubled > 0 || len(sent.acked) < crashEvents {
		t.Errorf("of %d events, %d were lost and %d doubled", len(sent.acked), lost, doubled)
	}
	for spool, seqs := range places {
		for seq := range seqs {
			if seq > 1 && !seqs[seq-1] {
				t.Errorf("spool %s has %d but not %d", spool, seq, seq-1)
			}
		}
	}
}
