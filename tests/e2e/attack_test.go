package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// attack floods an address until ctx ends.
type attack struct {
	name string
	run  func(ctx context.Context, addr string)
}

const (
	attackers = 4
	// attackEvery is the pace of one attacker. They run on this machine: what
	// they burn themselves must not be what the test measures.
	attackEvery = 50 * time.Millisecond
	// attackRuns is how many actions are timed in one round without, and with,
	// attackers.
	attackRuns = 30
	// attackRounds: a spike of this machine passes, a real slowdown stays.
	attackRounds = 4
)

// junk is noise, made once.
var junk = func() []byte {
	b := make([]byte, 16<<10)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}()

var attacks = []attack{
	{"garbage on TCP", func(ctx context.Context, addr string) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		_, _ = c.Write(junk)
		_, _ = io.Copy(io.Discard, c)
	}},
	{"garbage on UDP", func(ctx context.Context, addr string) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "udp", addr)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		for i := range 25 {
			packet := slices.Clone(junk[i*100 : i*100+1200])
			packet[0] |= 0xc0 // a QUIC long header
			_, _ = c.Write(packet)
		}
	}},
	{"slow handshakes", func(ctx context.Context, addr string) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		hello := []byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for _, b := range hello {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.Copy(io.Discard, c)
	}},
	{"wrong ALPN and no certificate", func(ctx context.Context, addr string) {
		offers := [][]string{nil, {"h2"}, {"sallyport-up/1"}, {"sallyport-down/1"}, {"sallyport-session/1"}}
		d := tls.Dialer{NetDialer: &net.Dialer{Timeout: time.Second}, Config: &tls.Config{InsecureSkipVerify: true, NextProtos: offers[rand.IntN(len(offers))]}}
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		// TLS 1.3 tells a client without a certificate at its first read.
		_, _ = c.Read(make([]byte, 1))
	}},
	{"a body and a header of 100 MB while enrolling", func(ctx context.Context, addr string) {
		d := tls.Dialer{NetDialer: &net.Dialer{Timeout: time.Second}, Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"sallyport-enroll/1"}}}
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		settings := []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}
		_, _ = c.Write(settings)
		// A HEADERS frame without END_HEADERS, then CONTINUATION for ever.
		frame := func(kind byte, payload []byte) []byte {
			n := len(payload)
			return append([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, 0, 0, 0, 0, 1}, payload...)
		}
		block := bytes.Repeat([]byte{0x40, 1, 'a', 1, 'b'}, 3000)
		if _, err := c.Write(frame(1, block)); err != nil {
			return
		}
		for range 100 << 20 / len(block) {
			if _, err := c.Write(frame(9, block)); err != nil {
				return
			}
		}
	}},
}

// TestAttacks: while strangers do their worst at an RCP's port, a real node's
// actions stay as fast as they were, within a factor of two.
//
// Quiet and attacked times are taken in turn, so that what else slows this
// machine slows both; nine of ten are looked at, for the slowest one of a
// round is the machine's.
func TestAttacks(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)

	act := func() time.Duration {
		t.Helper()
		return gateway.Run("action", "run", "--node", "web-1", "--", "true").Exits(0).Took
	}
	act() // warm
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			var quiet, attacked []time.Duration
			for round := 1; ; round++ {
				for range attackRuns {
					quiet = append(quiet, act())
				}
				stop := a.begin(t, relay.Address)
				for range attackRuns {
					attacked = append(attacked, act())
				}
				stop()
				usual, during := nineOfTen(quiet), nineOfTen(attacked)
				t.Logf("round %d: nine of ten actions take %v at most, %v during the attack", round, usual, during)
				// Below 50 ms the factor would measure this machine.
				if limit := max(2*usual, 50*time.Millisecond); during <= limit {
					break
				} else if round == attackRounds {
					t.Errorf("nine of ten actions take up to %v during the attack, %v without: want at most %v", during, usual, limit)
					break
				}
			}
			harness.Eventually(t, 10*time.Second, "the node is still running", func() error {
				n, err := gateway.Node("web-1")
				if err == nil && n.State != "running" {
					err = fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
				}
				return err
			})
		})
	}
	if relay.Log() == "" {
		t.Error("the RCP logged nothing at all")
	}
}

// begin starts the attackers; what it returns ends them and waits for them.
func (a attack) begin(t *testing.T, addr string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range attackers {
		all.Go(func() {
			pace := time.NewTicker(attackEvery)
			defer pace.Stop()
			for ctx.Err() == nil {
				a.run(ctx, addr)
				select {
				case <-pace.C:
				case <-ctx.Done():
				}
			}
		})
	}
	return func() {
		cancel()
		all.Wait()
	}
}

// nineOfTen returns the time that nine of ten of took do not exceed.
func nineOfTen(took []time.Duration) time.Duration {
	slices.Sort(took)
	return took[len(took)*9/10-1]
}
