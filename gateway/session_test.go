package gateway

import (
	"context"
	"errors"
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
