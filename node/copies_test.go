package node

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/local"
	"sallyport/internal/wire"
)

func nonceHeader(n wire.Nonce) http.Header { return http.Header{wire.HeaderNonce: {n.String()}} }

// TestEachNonceIsGivenOnce: also to several gateways that ask at one time.
func TestEachNonceIsGivenOnce(t *testing.T) {
	const gateways, hellos = 4, 200
	c := copies{held: wire.NewNonce()}
	first := c.held
	var mu sync.Mutex
	given := map[wire.Nonce]int{}
	brought := map[wire.Nonce]bool{first: true}
	var wg sync.WaitGroup
	for range gateways {
		wg.Go(func() {
			for range hellos {
				n := wire.NewNonce()
				previous, _ := c.heard(nonceHeader(n))
				mu.Lock()
				given[previous]++
				brought[n] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(given) != gateways*hellos || given[first] != 1 || given[wire.Nonce{}] != 0 {
		t.Errorf("%d different ones were given for %d hellos; the first one %d times", len(given), gateways*hellos, given[first])
	}
	for n, times := range given {
		if times != 1 || !brought[n] {
			t.Errorf("%v was given %d times, and was brought: %v", n, times, brought[n])
		}
	}
}

func TestARequestWithoutANonceChangesNothing(t *testing.T) {
	c := copies{held: wire.NewNonce()}
	first := c.held
	for _, h := range []http.Header{{}, {wire.HeaderMark: {"1"}}, {wire.HeaderNonce: {"x"}, wire.HeaderMark: {"1"}}, {wire.HeaderNonce: {wire.Nonce{}.String()}}} {
		if previous, marked := c.heard(h); !previous.IsZero() || marked {
			t.Errorf("%v: %v, %v", h, previous, marked)
		}
	}
	n := wire.NewNonce()
	if previous, _ := c.heard(nonceHeader(n)); previous != first {
		t.Errorf("%v was held, %v is given", first, previous)
	}
	if previous, _ := c.heard(nonceHeader(n)); !previous.IsZero() || c.held != n { // a request that came twice
		t.Errorf("one that was brought twice is given: %v", previous)
	}
	if got := c.boot("b"); got != "b" {
		t.Errorf("boot %s", got)
	}
}

// TestCopiesGetBootIDsOfTheirOwn: what a gateway says in a session tells two
// copies apart, in the hello and on the host, and reidentify means one of them.
func TestCopiesGetBootIDsOfTheirOwn(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	in := ag.in()
	s := ag.session()
	ask := func(h http.Header) (out wire.Hello) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://peer"+wire.PathHello, nil)
		if err != nil {
			t.Fatal(err)
		}
		if h != nil {
			req.Header = h
		}
		res, err := s.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		if err := wire.DecodeJSON(res.Body, wire.MaxHello, &out); err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("status %d: %v", res.StatusCode, err)
		}
		return out
	}
	plain := ask(nil)
	if !plain.Previous.IsZero() || plain.Boot != in.boot {
		t.Errorf("without a nonce: %v, boot %s", plain.Previous, plain.Boot)
	}
	one, two := wire.NewNonce(), wire.NewNonce()
	start := ask(nonceHeader(one))
	if start.Previous.IsZero() || start.Digest() != plain.Digest() {
		t.Errorf("the first nonce is answered with %v", start.Previous)
	}
	mark := nonceHeader(two)
	mark.Set(wire.HeaderMark, "1")
	h := ask(mark)
	if h.Previous != one || h.Boot != wire.MarkBoot(in.boot, two) {
		t.Errorf("previous %v, boot %s", h.Previous, h.Boot)
	}
	if sig := in.signal(1); sig.Digest != h.Digest() || sig.Boot != in.boot {
		t.Errorf("signal %+v: its boot must not change within a channel, and its digest is that of the hello", sig)
	}
	if st := ag.a.Status(t.Context()); st.Boot != h.Boot || st.Instances[0].Boot != h.Boot {
		t.Errorf("local status shows %s and %s, the hello %s", st.Boot, st.Instances[0].Boot, h.Boot)
	}
	for boot, admitted := range map[string]bool{in.boot: false, wire.MarkBoot(in.boot, one): false, h.Boot: true} {
		err := in.admitReidentify(&wire.Reidentify{Node: in.id.ID(), Boot: boot, Installation: installation})
		if meant := err == nil || !strings.Contains(err.Error(), "it is for the process with boot ID"); meant != admitted {
			t.Errorf("reidentify for boot %s: %v", boot, err)
		}
	}
}

// TestQuarantineIsSeenOnTheHost: what a gateway says in a session, and takes back, is
// what the host's people see.
func TestQuarantineIsSeenOnTheHost(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	s := ag.session()
	for _, want := range []bool{true, true, false} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://peer"+wire.PathHello, nil)
		if err != nil {
			t.Fatal(err)
		}
		if want {
			req.Header.Set(wire.HeaderQuarantined, "1")
		}
		res, err := s.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		var h wire.Hello
		if err := errors.Join(wire.DecodeJSON(res.Body, wire.MaxHello, &h), res.Body.Close()); err != nil || h.State != wire.StateRunning {
			t.Errorf("its hello says %s: %v", h.State, err) // what the gateway knows needs no saying
		}
		st := ag.a.Status(t.Context())
		if got := st.State == string(wire.StateQuarantined) && strings.Contains(st.Reason, "another live host"); got != want {
			t.Errorf("status %s (%s), want quarantined: %t", st.State, st.Reason, want)
		}
		i := slices.IndexFunc(ag.a.Doctor(t.Context()), func(c local.Check) bool {
			return c.Check == "quarantine" && !c.OK && strings.Contains(c.Fix, "--boot "+st.Boot) && strings.Contains(c.Fix, "node resume")
		})
		if (i >= 0) != want {
			t.Errorf("doctor: %+v", ag.a.Doctor(t.Context()))
		}
	}

	// Who waits for another certificate has nothing to do with the other host.
	ag.in().hearQuarantine(true)
	if err := ag.in().id.Reidentify(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it waits", func() bool { return ag.in().hello().State == wire.StatePending })
	if st := ag.a.Status(t.Context()); st.State != string(wire.StatePending) {
		t.Errorf("with another identity: %s (%s)", st.State, st.Reason)
	}
}
