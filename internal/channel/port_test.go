package channel_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// works asserts that an honest party is still served.
func works(t *testing.T, p *plant) {
	t.Helper()
	c, err := p.dialler(t).Dial(t.Context())
	if err != nil {
		t.Fatalf("an honest party is harmed: %v", err)
	}
	defer c.Close(nil)
	res, err := request(t.Context(), t, c, http.MethodGet, "/", nil)
	if err != nil {
		t.Fatalf("an honest party is harmed: %v", err)
	}
	_ = res.Body.Close()
}

var ok = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

func TestGarbageIsNotAnswered(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	for name, garbage := range map[string]string{
		"http": "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "http2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "zero": "\x00", "lane": "SPLANE1\n",
		"high": "\xff\xff\xff", "sslv2": "\x80\x2e\x01",
	} {
		c, err := net.Dial("tcp", p.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, garbage)
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		b, err := io.ReadAll(c)
		if len(b) != 0 || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Errorf("%s: answered %q, %v", name, b, err)
		}
		_ = c.Close()
	}
	works(t, p)
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func TestGarbageOnUDPIsNotAnswered(t *testing.T) {
	p := newPlant(t, variant{"h3", true}, ok)
	p.listen(t)
	c, err := net.Dial("udp", p.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for _, n := range []int{1, 20, 40} { // below what a stateless reset may answer (RFC 9000 section 10.3.3)
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(0x40 + i)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1500)); err == nil {
		t.Errorf("garbage was answered with %d bytes", n)
	}
	works(t, p)
}

func TestTLSIsRefusedUnlessItFits(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.enroll = true
	p.listen(t)
	cert := func(id *identity.Identity) *tls.Certificate {
		c, err := id.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	self, err := p.ca.Pending(t, wire.RoleNode).SelfSigned()
	if err != nil {
		t.Fatal(err)
	}
	foreign := identitytest.NewCA(t).Party(t, wire.RoleGateway)
	good := cert(p.up)
	for name, c := range map[string]*tls.Config{
		"no ALPN":                   {Certificates: []tls.Certificate{*good}},
		"h2":                        {Certificates: []tls.Certificate{*good}, NextProtos: []string{"h2"}},
		"two ALPNs":                 {Certificates: []tls.Certificate{*good}, NextProtos: []string{channel.ALPNUp, channel.ALPNDown}},
		"session ALPN":              {Certificates: []tls.Certificate{*good}, NextProtos: []string{channel.ALPNSession}},
		"QUIC ALPN on TCP":          {Certificates: []tls.Certificate{*good}, NextProtos: []string{channel.ALPNUpH3}},
		"TLS 1.2":                   {Certificates: []tls.Certificate{*good}, NextProtos: []string{channel.ALPNUp}, MaxVersion: tls.VersionTLS12},
		"no certificate":            {NextProtos: []string{channel.ALPNUp}},
		"no certificate, enrolment": {NextProtos: []string{channel.ALPNEnroll}},
		"self-signed":               {Certificates: []tls.Certificate{*self}, NextProtos: []string{channel.ALPNUp}},
		"another CA":                {Certificates: []tls.Certificate{*cert(foreign)}, NextProtos: []string{channel.ALPNUp}},
		"node as upstream":          {Certificates: []tls.Certificate{*cert(p.ca.Party(t, wire.RoleNode))}, NextProtos: []string{channel.ALPNUp}},
		"gateway as downstream":     {Certificates: []tls.Certificate{*good}, NextProtos: []string{channel.ALPNDown}},
		"other intermediate":        {Certificates: []tls.Certificate{*cert(p.ca.Party(t, wire.RoleRCP))}, NextProtos: []string{channel.ALPNUpBulk + "x"}},
	} {
		c.InsecureSkipVerify = true // an attacker does not care
		conn, err := tls.Dial("tcp", p.listener.Addr().String(), c)
		if err == nil {
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		if err == nil || isTimeout(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n := len(p.listener.Conns()); n != 0 {
		t.Errorf("%d connections were let in", n)
	}
	works(t, p)
}

func TestDialRefusesWhoeverDoesNotFit(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, ok)
		p.admit = func(peer identity.Peer, alpn string) error {
			if strings.Contains(alpn, "bulk") {
				return errors.New("no bulk here")
			}
			return nil
		}
		p.listen(t)

		other := wire.NewID()
		d := p.dialler(t)
		d.Expect = &other
		if c, err := d.Dial(t.Context()); !errors.Is(err, channel.ErrWrongPeer) {
			t.Errorf("another UUID gave %v, %v", c, err)
		}

		d = p.dialler(t)
		d.Identity = identitytest.NewCA(t).Party(t, d.Identity.Role())
		if c, err := d.Dial(t.Context()); err == nil {
			t.Errorf("another trust domain gave %v", c.Peer())
		}

		if v.carrier != "h3" {
			d = p.dialler(t)
			d.Class = channel.ClassBulk
			if c, err := d.Dial(t.Context()); err == nil {
				t.Errorf("Admit was not asked: %v", c.Peer())
			} else if v.carrier == "h2" && !strings.Contains(err.Error(), "refuses us") {
				t.Errorf("the refusal reads %q", err)
			}
		}

		d = p.dialler(t)
		d.Identity = p.ca.Expired(t, d.Identity.Role())
		if c, err := d.Dial(t.Context()); err == nil {
			t.Errorf("an expired leaf was let in: %v", c.Peer())
		}
	})
}

func TestSlowHandshakesAreBounded(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.limits = channel.Limits{HandshakesPerSource: 8, HandshakeTimeout: time.Second}
	p.listen(t)
	var slow []net.Conn
	defer func() {
		for _, c := range slow {
			_ = c.Close()
		}
	}()
	for i := range 20 {
		c, err := net.Dial("tcp", p.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			_, _ = c.Write([]byte{0x16, 0x03, 0x01})
		}
		slow = append(slow, c)
	}
	start := time.Now()
	for _, c := range slow {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); isTimeout(err) {
			t.Fatal("a slow handshake is never ended")
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("slow handshakes lasted %v, the limit is 1 s", d)
	}
	works(t, p)
}

// Strangers behind a party's own address hold every place that there is for a
// handshake, at each of the points where they can stop, and come back as soon as they are
// cut. The party comes in.
func TestStrangersBehindTheSameAddress(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.limits = channel.Limits{Handshakes: 48, HandshakesPerSource: 12, HandshakeTimeout: 30 * time.Second}
	p.listen(t)
	addr := p.listener.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	var strangers sync.WaitGroup
	defer strangers.Wait()
	defer cancel()
	hello := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{channel.ALPNUp}, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
	var held atomic.Int64 // connections that were there at one time or another
	for i := range 2 * p.limits.Handshakes {
		strangers.Go(func() {
			for ctx.Err() == nil {
				c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
				if err != nil {
					continue
				}
				held.Add(1)
				stop := context.AfterFunc(ctx, func() { _ = c.Close() })
				switch i % 3 {
				case 0:
				case 1:
					_, _ = c.Write([]byte{0x16, 0x03, 0x01})
				case 2:
					_ = tls.Client(c, hello).HandshakeContext(ctx) // waits for its own certificate
				}
				_, _ = c.Read(make([]byte, 1))
				stop()
				_ = c.Close()
			}
		})
	}
	eventually(t, "the strangers hold all places", func() bool { return held.Load() > int64(2*p.limits.Handshakes) })
	for range 3 {
		began, tries := time.Now(), 1
		c, err := p.dialler(t).Dial(t.Context())
		for ; err != nil && time.Since(began) < 20*time.Second; tries++ {
			c, err = p.dialler(t).Dial(t.Context())
		}
		if err != nil {
			t.Fatalf("locked out for %v, %d attempts, by %d connections: %v", time.Since(began), tries, held.Load(), err)
		}
		t.Logf("in after %v and %d attempts, against %d connections", time.Since(began).Round(time.Millisecond), tries, held.Load())
		c.Close(nil)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func TestRevocationCutsAndIsNotResumed(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, ok)
		p.listen(t)
		d := p.dialler(t)
		listening := p.down
		if !v.ordinary {
			listening = p.up
		}
		run, cancel := context.WithCancel(t.Context())
		defer cancel()
		dial := func() (*channel.Conn, error) {
			c, err := d.Dial(t.Context())
			if err == nil && !v.ordinary {
				go p.serve(run, c)
			}
			return c, err
		}
		for _, resumed := range []bool{false, true} {
			c, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			if c.Resumed() != (resumed && v.carrier != "h3") {
				t.Errorf("resumed is %v", c.Resumed())
			}
			if v.ordinary {
				res, err := request(t.Context(), t, c, http.MethodGet, "/", nil)
				if err != nil {
					t.Fatal(err)
				}
				_ = res.Body.Close()
			}
			if !resumed {
				c.Close(nil)
				continue
			}
			if _, err := listening.ApplyRevocations(p.ca.Revoke(t, 1, d.Identity.KeyHash())); err != nil {
				t.Fatal(err)
			}
			select {
			case <-c.Done():
			case <-time.After(5 * time.Second):
				t.Error("a revoked peer keeps its channel")
			}
		}
		if c, err := dial(); err == nil {
			t.Errorf("a revoked peer came in, resumed=%v", c.Resumed())
			c.Close(nil)
		} else if v.carrier != "pipe" && !channel.RefusesUs(err) { // a pipe may be closed before the alert was read
			t.Errorf("the dialler does not learn that it is refused: %v", err)
		}
	})
}

// Ten thousand nodes come back to an RCP that was started again.
func TestResumedAfterARestartOfTheListener(t *testing.T) {
	v := variant{"h2", false} // an RCP and the nodes that dial it
	p := newPlant(t, v, ok)
	p.listen(t)
	d := p.dialler(t)
	for _, resumed := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		c, err := d.Dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			p.serve(ctx, c)
		}()
		up := <-p.accepted
		if res, err := request(ctx, t, up, http.MethodGet, "/", nil); err != nil { // the ticket has arrived
			t.Fatal(err)
		} else {
			_ = res.Body.Close()
		}
		if c.Resumed() != resumed {
			t.Errorf("resumed is %v", c.Resumed())
		}
		p.stop()
		cancel()
		<-served
		p.listen(t)
		d.Addr = p.listener.Addr().String()
	}
}

func TestChannelEndsWithTheLeafThatOpenedIt(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		t.Parallel()
		p := newPlant(t, v, ok)
		end := time.Now().Add(2 * time.Second).Truncate(time.Second).Add(time.Second)
		p.ca.Certify(t, p.down, identitytest.NotAfter(end))
		up := p.connect(t)
		if !up.Expires().Equal(end) {
			t.Errorf("expires %v, want %v", up.Expires(), end)
		}
		select {
		case <-up.Done():
			if time.Now().Before(end.Add(-100 * time.Millisecond)) {
				t.Error("it ended early")
			}
		case <-time.After(10 * time.Second):
			t.Error("the channel outlives the leaf")
		}
	})
}

func TestEnrolment(t *testing.T) {
	big := strings.Repeat("x", wire.MaxEnrollBody+1)
	for _, pendingRole := range []wire.Role{wire.RoleNode, wire.RoleRCP} {
		for _, upRole := range []wire.Role{wire.RoleGateway, wire.RoleRCP} {
			each(t, func(t *testing.T, v variant) {
				p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case r.Method == http.MethodConnect:
						echo(t).ServeHTTP(w, r)
					case r.URL.Path == "/big":
						_, _ = io.WriteString(w, big)
					}
				}))
				p.up, p.down, p.enroll = p.ca.Party(t, upRole), p.ca.Pending(t, pendingRole), true
				p.listen(t)
				d := p.dialler(t)
				d.Enroll = func() bool { return true }
				c, err := d.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close(nil)
				up := c
				if !v.ordinary {
					run := make(chan struct{})
					go func() { defer close(run); p.serve(context.Background(), c) }()
					defer func() { c.Close(nil); <-run }()
					up = <-p.accepted
					if c.Peer().Party.ID != p.up.ID() {
						t.Errorf("the pending party sees %s", c.Peer())
					}
				}
				if !up.Enrolling() || !up.Peer().Pending || up.Peer().Key != p.down.KeyHash() || up.Direction() != channel.PeerDownstream {
					t.Errorf("peer is %+v", up.Peer())
				}
				s, err := up.Connect(t.Context(), wire.PendingAuthority(p.down.KeyHash()), nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(s, "hello"); err != nil {
					t.Error(err)
				}
				buf := make([]byte, 5)
				if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "hello" {
					t.Errorf("got %q, %v", buf, err)
				}
				_ = s.Close()
				res, err := request(t.Context(), t, up, http.MethodPost, "/x", strings.NewReader(big))
				if err != nil {
					t.Fatal(err)
				}
				if _ = res.Body.Close(); res.StatusCode != http.StatusRequestEntityTooLarge {
					t.Errorf("a large body gave %d", res.StatusCode)
				}
				res, err = request(t.Context(), t, up, http.MethodGet, "/big", nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, res.Body); !errors.Is(err, wire.ErrTooLarge) {
					t.Errorf("a large answer gave %v", err)
				}
				_ = res.Body.Close()
			})
		}
	}
}

func TestEnrolmentTrustsOnlyThePin(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		other := identitytest.NewCA(t)
		for name, change := range map[string]func(p *plant){
			"upstream of another root": func(p *plant) { p.up = other.Party(t, wire.RoleGateway) },
			"upstream is a node":       func(p *plant) { p.up = p.ca.Party(t, wire.RoleNode) },
			"both pending":             func(p *plant) { p.up = p.ca.Pending(t, wire.RoleRCP) },
			"closed to enrolment":      func(p *plant) { p.enroll = false },
		} {
			p := newPlant(t, v, ok)
			p.down, p.enroll = p.ca.Pending(t, wire.RoleNode), true
			change(p)
			p.listen(t)
			d := p.dialler(t)
			d.Enroll = func() bool { return true }
			if c, err := d.Dial(t.Context()); err == nil {
				t.Errorf("%s: connected to %s", name, c.Peer())
				c.Close(nil)
			}
		}
	})
}

func TestRevokedKeyCannotWait(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		if v.ordinary {
			return // then the pending party listens
		}
		p := newPlant(t, v, ok)
		p.down, p.enroll = p.ca.Pending(t, wire.RoleNode), true
		if _, err := p.up.ApplyRevocations(p.ca.Revoke(t, 1, p.down.KeyHash())); err != nil {
			t.Fatal(err)
		}
		p.listen(t)
		if c, err := p.dialler(t).Dial(t.Context()); err == nil {
			t.Errorf("a revoked key waits: %s", c.Peer())
			c.Close(nil)
		}
	})
}

func TestPendingPartiesAreBounded(t *testing.T) {
	p := newPlant(t, variant{"h2", false}, ok)
	p.enroll = true
	p.limits = channel.Limits{PendingPerSource: 3}
	p.listen(t)
	var cut int
	for range 6 {
		p.down = p.ca.Pending(t, wire.RoleNode)
		c, err := p.dialler(t).Dial(t.Context())
		if err != nil {
			cut++
			continue
		}
		ended := make(chan struct{})
		go func() { defer close(ended); p.serve(context.Background(), c) }()
		defer func() { c.Close(nil); <-ended }()
		select {
		case <-p.accepted:
		case <-c.Done():
			cut++
		}
	}
	if cut != 3 || p.listener.PendingCount() != 3 {
		t.Errorf("%d of 6 were cut, %d wait", cut, p.listener.PendingCount())
	}
}

func TestListenNeedsWhatItNeeds(t *testing.T) {
	if _, err := channel.Listen(channel.ListenConfig{}); err == nil {
		t.Error("listening without an identity")
	}
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	_, err := channel.Listen(channel.ListenConfig{Addr: p.listener.Addr().String(), Identity: p.down, Log: channeltest.Log(t)})
	if err == nil || !strings.Contains(err.Error(), "listen on "+p.listener.Addr().String()) {
		t.Errorf("a used port gave %v", err)
	}
}

// A party that listens and has made itself a new key is met with it at the first
// attempt: the ticket of a session with the old one, which is revoked, leads nowhere.
func TestListenerThatWasRekeyed(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	d := p.dialler(t)
	meet := func() (resumed bool) {
		t.Helper()
		c, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close(nil)
		res, err := request(t.Context(), t, c, http.MethodGet, "/", nil) // the ticket has arrived
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return c.Resumed()
	}
	if meet() || !meet() {
		t.Error("want the second channel resumed, not the first")
	}
	old := p.down.KeyHash()
	csr, err := p.down.CSR(true)
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := identity.ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	party, _ := p.down.Party()
	if err := p.down.Install(p.ca.IssueKey(t, party, key)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.up.ApplyRevocations(p.ca.Revoke(t, 1, old)); err != nil {
		t.Fatal(err)
	}
	if meet() {
		t.Error("a session with the old key was resumed")
	}
}
