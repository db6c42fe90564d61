package parking

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// Limits of the listener.
const (
	maxConns     = 2048
	readHeader   = 10 * time.Second
	idleClient   = time.Minute
	maxHeader    = 32 << 10
	stopProxy    = time.Second
	greetTimeout = 10 * time.Second // for the answer that a gateway accepted
)

// taken is a stream to a gateway for which a client is found.
type taken struct {
	ctx    context.Context
	stream *tunnel.Stream
	done   chan struct{} // closed when the client is served
}

// Serve gives a gateway's stream to the connection that it asks for, and
// returns when both are done.
func (l *Lot) Serve(ctx context.Context, id wire.ID, s *tunnel.Stream) {
	t := &taken{ctx: ctx, stream: s, done: make(chan struct{})}
	if err := l.take(id, t); err != nil {
		s.Refuse(tunnel.NotFound, err.Error())
		return
	}
	<-t.done
}

// ServeHTTP answers local clients: CONNECT name:port, or a request for
// http://name/path. The name is that of a service, the port is of no interest.
func (l *Lot) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	service, err := serviceOf(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	source, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		http.Error(w, "the client has no address", http.StatusInternalServerError)
		return
	}
	if why := l.closed(); why != "" {
		l.refused.Add(1)
		if n, say := l.shut.refused(why, time.Now()); say {
			l.log.Info("local client refused", "service", service, "source", source.String(), "status", http.StatusServiceUnavailable, "reason", why, "times", n)
		}
		http.Error(w, "sallyport proxy: "+why, http.StatusServiceUnavailable)
		return
	}
	p, leave, err := l.park(service, source)
	if err != nil {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "sallyport proxy: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	v := l.await(r.Context(), p, leave)
	if v.taken == nil {
		if v.status != 0 {
			l.log.Info("local client refused", "service", service, "source", p.Source, "status", v.status, "reason", v.reason)
			http.Error(w, fmt.Sprintf("sallyport proxy: service %q: %s", service, v.reason), v.status)
		}
		return
	}
	l.joined.Add(1)
	defer l.joined.Add(-1)
	defer close(v.taken.done)
	l.log.Info("local client accepted", "service", service, "source", p.Source)
	if err := l.join(w, r, v.taken); err != nil {
		l.log.Debug("local client ended", "service", service, "source", p.Source, "reason", err)
	}
}

// await returns what becomes of a connection; nothing if its client left.
func (l *Lot) await(ctx context.Context, p *parked, leave func()) verdict {
	timer := time.NewTimer(acceptWithin)
	defer timer.Stop()
	select {
	case v := <-p.verdict:
		return v
	case <-ctx.Done():
	case <-timer.C:
	}
	leave()
	select {
	case v := <-p.verdict: // it was taken at the same moment
		return v
	default:
	}
	if ctx.Err() != nil {
		return verdict{}
	}
	l.refused.Add(1)
	return verdict{status: http.StatusGatewayTimeout, reason: errNobody.Error()}
}

// serviceOf reads the name that a client asks for. An address is no name: no
// client chooses where a connection leads.
func serviceOf(r *http.Request) (string, error) {
	host := r.URL.Host
	if r.Method == http.MethodConnect {
		host = r.Host
	}
	switch {
	case host == "":
		return "", errors.New("sallyport proxy: want CONNECT name:port, or a request for http://name/path")
	case r.Method != http.MethodConnect && r.URL.Scheme != "http":
		return "", errors.New("sallyport proxy: want http:// in a request that is not CONNECT")
	}
	u := url.URL{Host: host}
	name := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	if name == "" || len(name) > wire.MaxService || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		return "", errors.New("sallyport proxy: this is not the name of a service")
	}
	return name, nil
}

// join answers the client and copies both ways. A request in absolute form goes
// on in the form that servers know, and its connection ends with the answer.
func (l *Lot) join(w http.ResponseWriter, r *http.Request, t *taken) error {
	fail := func(err error) error {
		t.stream.Refuse(tunnel.Failed, err.Error())
		return err
	}
	h, ok := w.(http.Hijacker)
	if !ok {
		return fail(errors.New("connection cannot be taken over"))
	}
	conn, rw, err := h.Hijack()
	if err != nil {
		return fail(err)
	}
	if err := conn.SetDeadline(time.Now().Add(greetTimeout)); err != nil {
		return errors.Join(fail(err), conn.Close())
	}
	head := requestHead(r)
	if r.Method == http.MethodConnect {
		head = nil
		if _, err := conn.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
			return errors.Join(fail(err), conn.Close())
		}
	}
	early, err := rw.Reader.Peek(rw.Reader.Buffered()) // what the client sent behind its header
	if err != nil {
		return errors.Join(fail(err), conn.Close())
	}
	if head = append(head, early...); len(head) > 0 {
		if _, err := t.stream.Write(head); err != nil {
			return errors.Join(err, conn.Close())
		}
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return errors.Join(fail(err), conn.Close())
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.ctx))
	defer cancel(nil)
	stop := context.AfterFunc(r.Context(), func() {
		if errors.Is(context.Cause(r.Context()), errStopping) {
			cancel(errStopping)
		}
	})
	defer stop()
	_, _, err = tunnel.Join(ctx, t.stream, conn)
	return err
}

// hopByHop are headers between a client and its proxy (RFC 9110, 7.6.1).
var hopByHop = []string{"Connection", "Proxy-Connection", "Proxy-Authorization", "Proxy-Authenticate", "Keep-Alive", "Te", "Upgrade"}

// requestHead is the header of a request as its service gets it.
func requestHead(r *http.Request) []byte {
	upgrade := r.Header.Get("Upgrade")
	header := r.Header.Clone()
	for _, names := range header.Values("Connection") {
		for name := range strings.SplitSeq(names, ",") {
			header.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hopByHop {
		header.Del(name)
	}
	if upgrade != "" {
		header.Set("Connection", "Upgrade")
		header.Set("Upgrade", upgrade)
	} else {
		header.Set("Connection", "close")
	}
	// Where the body ends is no option of the connection, whatever it lists.
	switch length := r.Header.Get("Content-Length"); {
	case len(r.TransferEncoding) > 0:
		header.Del("Content-Length")
		header.Set("Transfer-Encoding", "chunked")
	case length != "":
		header.Set("Content-Length", length)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.URL.RequestURI(), r.URL.Host)
	_ = header.Write(&b) // a buffer takes everything
	b.WriteString("\r\n")
	return b.Bytes()
}

var errStopping = errors.New("the proxy is being stopped")

// Port is a listener for local clients.
type Port struct {
	lot *Lot
	ln  net.Listener
	srv *http.Server
}

// Listen opens the listener; nothing is served before Run.
func Listen(addr string, lot *Lot, log *slog.Logger) (*Port, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	p := &Port{lot: lot, ln: ln}
	var open atomic.Int64
	p.srv = &http.Server{
		Handler: lot, ReadHeaderTimeout: readHeader, IdleTimeout: idleClient, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState: func(c net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				if open.Add(1) > maxConns {
					_ = c.Close()
				}
			case http.StateClosed, http.StateHijacked:
				open.Add(-1)
			}
		},
	}
	return p, nil
}

// Addr is the address in use.
func (p *Port) Addr() net.Addr { return p.ln.Addr() }

// Close gives a port up that never ran.
func (p *Port) Close() error { return p.ln.Close() }

// Run serves until ctx ends, and returns when every connection has ended.
func (p *Port) Run(ctx context.Context) error {
	serving, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	var handlers sync.WaitGroup
	p.srv.BaseContext = func(net.Listener) context.Context { return serving }
	p.srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		p.lot.ServeHTTP(w, r)
	})
	ended := make(chan error, 1)
	go func() { ended <- p.srv.Serve(p.ln) }()
	var err error
	select {
	case <-ctx.Done():
	case err = <-ended:
	}
	stop(errStopping) // who waits or copies ends now
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopProxy)
	defer cancel()
	if p.srv.Shutdown(closing) != nil {
		_ = p.srv.Close() // clients that send nothing
	}
	if err == nil {
		err = <-ended
	}
	handlers.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
