package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// bench of sessions whose dialling the test decides on.
func (b *bench) sessions(t *testing.T, dial func(ctx context.Context, link wire.ID) (endToEnd, error)) *sessions {
	t.Helper()
	m, err := newMetrics(nil, b.f)
	if err != nil {
		t.Fatal(err)
	}
	via := make(map[net.Conn]wire.ID)
	return newSessions(b.f, m, 0, func(_ context.Context, link wire.ID, _ string) (net.Conn, error) {
		c, _ := net.Pipe()
		via[c] = link
		return c, nil
	}, func(ctx context.Context, stream net.Conn, _ wire.Party) (endToEnd, error) {
		return dial(ctx, via[stream])
	})
}

// closedSession tells when it is closed.
type closedSession struct {
	nopSession
	closed chan struct{}
}

func (s closedSession) Close() error { close(s.closed); return nil }

// A party that is revoked while a session with it is being opened, or before
// anybody but its opener knows of it, gets no session out of that.
func TestCutEndsASessionThatIsBeingOpened(t *testing.T) {
	for _, c := range []struct {
		name  string
		fresh bool
		slow  bool // the opening goes on although it was told to end
	}{
		{name: "opening"}, {name: "opened all the same", slow: true}, {name: "proof", fresh: true}, {name: "proof that is under way", fresh: true, slow: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				r, n := b.rcp("dmz"), b.node("web", wire.StateRunning)
				b.up(r)
				b.snapshot(r, "e", nodePeer(n))
				rt := closedSession{closed: make(chan struct{})}
				s := b.sessions(t, func(ctx context.Context, _ wire.ID) (endToEnd, error) {
					if c.slow {
						time.Sleep(openWay / 2)
						return rt, nil
					}
					<-ctx.Done()
					return nil, context.Cause(ctx)
				})
				do := s.Do
				if c.fresh {
					do = s.fresh
				}
				got := make(chan error, 1)
				go func() {
					got <- do(t.Context(), wire.Party{Role: wire.RoleNode, ID: n}, func(ctx context.Context, _ *conversation) error {
						if !c.fresh {
							t.Error("something was said in it")
						}
						return context.Cause(ctx)
					})
				}()
				synctest.Wait()
				s.cut(n)
				if err := <-got; !errors.Is(err, errCutOff) {
					t.Fatal(err)
				}
				if c.slow {
					<-rt.closed
				}
				if len(s.warm)+len(s.opening)+len(s.tries) != 0 {
					t.Fatalf("%d are warm, %d being opened, %d under way", len(s.warm), len(s.opening), len(s.tries))
				}
			})
		})
	}
}

// lingeringSession takes as long to close as TLS waits for a stream that takes
// nothing.
type lingeringSession struct{ nopSession }

func (lingeringSession) Close() error { time.Sleep(5 * time.Second); return nil }

// Who opens sessions faster than they can be closed waits for those that give way.
func TestSessionsThatLingerAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		evil := b.rcp("evil")
		b.up(evil)
		ids, peers := make([]wire.ID, maxLingering+100), []wire.Peer{}
		for i := range ids {
			ids[i] = b.node(fmt.Sprint("n", i), wire.StateRunning)
			peers = append(peers, nodePeer(ids[i]))
		}
		b.snapshot(evil, "e", peers...)
		s := b.sessions(t, func(context.Context, wire.ID) (endToEnd, error) { return lingeringSession{}, nil })
		s.most = 1
		for _, id := range ids {
			if err := s.Do(t.Context(), wire.Party{Role: wire.RoleNode, ID: id}, func(context.Context, *conversation) error { return nil }); err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			n := s.lingering
			s.mu.Unlock()
			if n > maxLingering {
				t.Fatalf("%d linger", n)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_ = s.Run(ctx)
	})
}

// An RCP that lets nothing through delays neither the session with another
// party, which takes the place of the one that hangs, nor a revocation.
func TestNobodyWaitsForASessionToClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		evil, good := b.rcp("evil"), b.rcp("good")
		held, next, web := b.node("held", wire.StateRunning), b.node("next", wire.StateRunning), b.node("web", wire.StateRunning)
		b.up(evil)
		b.up(good)
		b.snapshot(evil, "e", nodePeer(held), nodePeer(next))
		b.snapshot(good, "g", nodePeer(web))
		s := b.sessions(t, func(_ context.Context, link wire.ID) (endToEnd, error) {
			if link == evil {
				return lingeringSession{}, nil
			}
			return nopSession{}, nil
		})
		s.most = 1
		began := time.Now()
		for _, id := range []wire.ID{held, web, next} {
			if err := s.Do(t.Context(), wire.Party{Role: wire.RoleNode, ID: id}, func(context.Context, *conversation) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		s.cut(next)
		b.f.members[held].revoked = "by a test"
		if err := s.lastWord(t.Context(), wire.Party{Role: wire.RoleNode, ID: held}, func(context.Context, *conversation) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("the end came after %v, with sessions that were not closed", took)
		}
	})
}
