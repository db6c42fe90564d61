package channel_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// variant is one of the six ways in which a channel can come about.
type variant struct {
	carrier  string // pipe, h2, h3
	ordinary bool   // the upstream party dials
}

func (v variant) String() string {
	if v.ordinary {
		return v.carrier + " ordinary"
	}
	return v.carrier + " reversed"
}

var variants = []variant{{"pipe", true}, {"pipe", false}, {"h2", true}, {"h2", false}, {"h3", true}, {"h3", false}}

// plant is an upstream and a downstream party and the port of one of them.
type plant struct {
	variant
	ca       *identitytest.CA
	up, down *identity.Identity
	handler  http.Handler // of the downstream party
	limits   channel.Limits
	admit    func(identity.Peer, string) error
	enroll   bool

	listener *channel.Listener
	network  *channeltest.Network
	accepted chan *channel.Conn
	stop     func() // the listener
}

func newPlant(t *testing.T, v variant, h http.Handler) *plant {
	ca := identitytest.NewCA(t)
	return &plant{variant: v, ca: ca, up: ca.Party(t, wire.RoleGateway), down: ca.Party(t, wire.RoleRCP), handler: h}
}

// serve is what the owner of a connection does with it.
func (p *plant) serve(ctx context.Context, c *channel.Conn) {
	if c.Direction() == channel.PeerUpstream {
		_ = c.Serve(ctx, p.handler)
		return
	}
	select {
	case p.accepted <- c:
	default:
	}
	<-c.Done()
}

// open makes the port of the party that does not dial. Nobody is answered before
// it runs.
func (p *plant) open(t *testing.T) {
	t.Helper()
	cfg := channel.ListenConfig{Addr: "127.0.0.1:0", Identity: p.down, Log: channeltest.Log(t), Limits: p.limits, Admit: p.admit,
		AllowUpstream: true, AllowDownstream: true, AllowEnroll: p.enroll}
	if !p.ordinary {
		cfg.Identity = p.up
	}
	if p.carrier == "pipe" {
		p.network = channeltest.NewNetwork()
		cfg.Listener = p.network
	}
	l, err := channel.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.listener = l
}

// listen opens that port and runs it.
func (p *plant) listen(t *testing.T) {
	t.Helper()
	p.open(t)
	l := p.listener
	p.accepted = make(chan *channel.Conn, 16)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Run(ctx, p.serve)
	}()
	p.stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(p.stop)
}

// dialler reaches that port.
func (p *plant) dialler(t *testing.T) *channel.Dialer {
	d := &channel.Dialer{Addr: p.listener.Addr().String(), Identity: p.up, Peer: channel.PeerDownstream, Log: channeltest.Log(t), Limits: p.limits}
	if !p.ordinary {
		d.Identity, d.Peer = p.down, channel.PeerUpstream
	}
	d.Carrier = p.carrier
	if p.carrier == "pipe" {
		d.Carrier, d.DialContext = channel.CarrierH2, p.network.DialContext
	}
	return d
}

// connect returns the upstream party's end of a new channel.
func (p *plant) connect(t *testing.T) *channel.Conn {
	t.Helper()
	if p.listener == nil {
		p.listen(t)
	}
	c, err := p.dialler(t).Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	if p.ordinary {
		close(ended)
	} else {
		go func() {
			defer close(ended)
			p.serve(context.Background(), c)
		}()
	}
	t.Cleanup(func() {
		c.Close(nil)
		<-ended
	})
	if p.ordinary {
		return c
	}
	select {
	case up := <-p.accepted:
		return up
	case <-time.After(10 * time.Second):
		t.Fatal("the listener got no channel")
		return nil
	}
}

func each(t *testing.T, f func(t *testing.T, v variant)) {
	for _, v := range variants {
		t.Run(v.String(), func(t *testing.T) { f(t, v) })
	}
}

func request(ctx context.Context, t *testing.T, rt http.RoundTripper, method, path string, body io.Reader) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "http://peer"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	return rt.RoundTrip(req)
}

func readAll(t *testing.T, res *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Error(err)
	}
	_ = res.Body.Close()
	return string(b)
}

func TestRequestAndAnswer(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c := channel.FromContext(r.Context())
			b, _ := io.ReadAll(r.Body)
			_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL.Path, b, c.Peer().Party.Role)
		}))
		up := p.connect(t)
		res, err := request(t.Context(), t, up, http.MethodPost, "/v1/x", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, res); got != "POST /v1/x hello gateway" {
			t.Errorf("got %q", got)
		}
		want := v.carrier
		if want == "pipe" {
			want = "h2"
		}
		if up.Carrier() != want || up.Dialled() != v.ordinary || up.Peer().Party.ID != p.down.ID() || up.Direction() != channel.PeerDownstream || up.Enrolling() {
			t.Errorf("connection is %s dialled=%v peer=%s %s", up.Carrier(), up.Dialled(), up.Peer(), up.Direction())
		}
		if v.carrier != "pipe" && up.RTT() <= 0 {
			t.Errorf("round trip is %v", up.RTT())
		}
		if err := up.Serve(t.Context(), http.NotFoundHandler()); !errors.Is(err, channel.ErrWrongSide) {
			t.Errorf("serving a downstream peer gave %v", err)
		}
		if n := up.Streams(); n != 0 {
			t.Errorf("%d streams are open", n)
		}
	})
}

func TestStreamIsAConn(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		conns := make(chan net.Conn)
		p := newPlant(t, v, handOver(t, conns))
		up := p.connect(t)
		for name, swap := range map[string]bool{"client": false, "server": true} {
			t.Run(name, func(t *testing.T) {
				nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
					c1, err = up.Connect(context.Background(), "x:443", nil)
					if err != nil {
						return nil, nil, nil, err
					}
					c2 = <-conns
					a, b := c1, c2
					if swap {
						c1, c2 = c2, c1
					}
					return c1, c2, func() { _ = a.Close(); _ = b.Close() }, nil
				})
			})
		}
	})
}

// handOver accepts every CONNECT and sends its stream to conns.
func handOver(t *testing.T, conns chan<- net.Conn) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := channel.AcceptConnect(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		h := &handed{Conn: c, closed: make(chan struct{})}
		defer func() { _ = h.Close() }()
		select {
		case conns <- h:
		case <-r.Context().Done():
			return
		}
		select {
		case <-h.closed:
		case <-r.Context().Done():
		}
	})
}

// handed is a stream whose handler wants to know when it is closed.
type handed struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (h *handed) Close() error {
	err := h.Conn.Close()
	h.once.Do(func() { close(h.closed) })
	return err
}

func echo(t *testing.T) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := channel.AcceptConnect(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.Copy(c, c)
	})
}

func TestRefusedConnect(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			channel.Refuse(w, http.StatusNotFound, "no\nsuch "+r.Host)
		}))
		_, err := p.connect(t).Connect(t.Context(), "x:443", nil)
		var refused *channel.RefusedError
		if !errors.As(err, &refused) || refused.Status != 404 || refused.Reason != "no such x:443" || !strings.Contains(err.Error(), "connect x:443") {
			t.Errorf("got %v", err)
		}
	})
}

// N-1 streams that nobody reads, filled to their windows in both directions,
// must not delay the Nth.
func TestStalledStreamsDelayNobody(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		const streams, window = 40, 16 << 10
		var stall sync.WaitGroup
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, err := channel.AcceptConnect(w, r)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			if r.Host == "live:443" {
				_, _ = io.Copy(c, c)
				return
			}
			fill(c)
			stall.Done()
			<-r.Context().Done()
		}))
		p.limits = channel.Limits{Streams: streams, StreamWindow: window}
		up := p.connect(t)
		stall.Add(2 * (streams - 1)) // both ends of each, before the first of them can be full
		for range streams - 1 {
			c, err := up.Connect(t.Context(), "stalled:443", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			go func() {
				fill(c)
				stall.Done()
			}()
		}
		stall.Wait()
		c, err := up.Connect(t.Context(), "live:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		want := bytes.Repeat([]byte("0123456789abcdef"), 16<<10) // 256 KiB, many windows
		go func() { _, _ = c.Write(want) }()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("the live stream is delayed by %d stalled ones: %v", streams-1, err)
		}
		for _, c := range p.listener.Conns() {
			c.Close(nil)
		}
	})
}

// fill writes until nothing moves.
func fill(c net.Conn) {
	for {
		_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Write(make([]byte, 4<<10)); err != nil {
			return
		}
	}
}

func TestForwardJoinsTwoChannels(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		far := newPlant(t, v, echo(t))
		next := far.connect(t)
		results := make(chan error, 10)
		near := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answered, err := channel.Forward(w, r, next, r.Host, http.Header{wire.HeaderHops: {"3"}})
			if !answered {
				channel.Refuse(w, http.StatusBadGateway, err.Error())
			}
			results <- err
		}))
		c, err := near.connect(t).Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte("forward "), 100<<10)
		go func() { _, _ = c.Write(want) }()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("bytes were lost: %v", err)
		}
		_ = c.Close()
		if err := <-results; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("forward ended with %v", err)
		}
		next.Close(nil)
		if _, err := near.connect(t).Connect(t.Context(), "x:443", nil); err == nil {
			t.Error("a dead next hop answered")
		} else if !errors.As(err, new(*channel.RefusedError)) {
			t.Errorf("got %v", err)
		}
	})
}

func TestLimitsOnHeadersAndBodies(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		var reached sync.Map
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n, err := io.Copy(io.Discard, r.Body)
			reached.Store(r.URL.Path, n)
			if err != nil {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
			}
		}))
		up := p.connect(t)
		check := func(name string, req *http.Request, want int) {
			t.Helper()
			res, err := up.RoundTrip(req)
			if err == nil {
				_ = res.Body.Close()
			}
			if err == nil && res.StatusCode != want {
				t.Errorf("%s: status %d, want %d", name, res.StatusCode, want)
			}
		}
		big := func(path string, length int64) *http.Request {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://peer"+path, io.LimitReader(zeros{}, 100<<20))
			if err != nil {
				t.Fatal(err)
			}
			req.ContentLength = length
			return req
		}
		check("declared body", big("/declared", 100<<20), http.StatusRequestEntityTooLarge)
		check("undeclared body", big("/undeclared", -1), http.StatusRequestEntityTooLarge)
		if n, _ := reached.Load("/declared"); n != nil {
			t.Error("a declared body of 100 MB reached the handler")
		}
		if n, ok := reached.Load("/undeclared"); ok && n.(int64) > wire.MaxRevocations {
			t.Errorf("the handler read %d bytes", n)
		}
		req := big("/header", 0)
		req.Body, req.ContentLength = http.NoBody, 0
		req.Header.Set("X-Big", strings.Repeat("x", 100<<10))
		check("header of 100 KiB", req, http.StatusRequestHeaderFieldsTooLarge)
		req = big("/header", 0)
		req.Body, req.ContentLength = http.NoBody, 0
		req.Header.Set("X-Big", strings.Repeat("x", 100<<20))
		check("header of 100 MiB", req, http.StatusRequestHeaderFieldsTooLarge)
		if _, ok := reached.Load("/header"); ok {
			t.Error("a large header reached the handler")
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestResponseHeaderTimeout(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		p.limits = channel.Limits{HeaderTimeout: 100 * time.Millisecond}
		up := p.connect(t)
		if _, err := request(t.Context(), t, up, http.MethodGet, "/", nil); !errors.Is(err, channel.ErrHeaderTimeout) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDrain(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		asked := make(chan wire.Drain, 1)
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == wire.PathDrain {
				var d wire.Drain
				if err := wire.DecodeJSON(r.Body, 1<<10, &d); err != nil {
					t.Error(err)
				}
				asked <- d
				return
			}
			echo(t).ServeHTTP(w, r)
		}))
		up := p.connect(t)
		c, err := up.Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		drained := make(chan error, 1)
		go func() { drained <- up.Drain(t.Context(), wire.Drain{Deadline: 20 * time.Second, Reason: "test"}) }()
		if d := <-asked; d.Reason != "test" || d.Deadline != 20*time.Second {
			t.Errorf("asked %+v", d)
		}
		<-up.DrainRequested()
		if _, err := up.Connect(t.Context(), "y:443", nil); !errors.Is(err, channel.ErrDraining) {
			t.Errorf("a new stream gave %v", err)
		}
		// What runs goes on.
		buf := make([]byte, 5)
		if _, err := c.Write([]byte("still")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "still" {
			t.Errorf("the running stream was cut: %q %v", buf, err)
		}
		select {
		case err := <-drained:
			t.Errorf("drained too early: %v", err)
		default:
		}
		_ = c.Close()
		if err := <-drained; err != nil {
			t.Error(err)
		}
		<-up.Done()
	})
}

func TestCloseReachesTheOtherEnd(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, echo(t))
		up := p.connect(t)
		c, err := up.Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte{1}); err != nil { // the handler has its stream when it echoes
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		for _, l := range p.listener.Conns() {
			l.Close(nil)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a stream outlives its channel")
		}
		<-up.Done()
		if up.Err() == nil {
			t.Error("no reason was given")
		}
		if _, err := request(t.Context(), t, up, http.MethodGet, "/", nil); err == nil {
			t.Error("a request on a dead channel was answered")
		}
		_ = c.Close()
	})
}

func TestStoppedListenerTellsEveryPeer(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, echo(t))
		p.listen(t)
		var peers []*channel.Conn
		var wg sync.WaitGroup
		defer wg.Wait()
		for range 24 {
			c, err := p.dialler(t).Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close(nil)
			if !p.ordinary {
				wg.Go(func() { p.serve(context.Background(), c) })
			}
			peers = append(peers, c)
		}
		p.stop()
		late := time.After(5 * time.Second) // a silent death is noticed after 20 s and more
		for i, c := range peers {
			select {
			case <-c.Done():
			case <-late:
				t.Fatalf("peer %d does not know that the listener has stopped", i)
			}
		}
	})
}
