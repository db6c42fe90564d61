package gateway

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// doorHello is how long a client at a proxy may take until its first byte.
const doorHello = 10 * time.Second

type doorPartyKey struct{}

// doorPartyFrom is the node or RCP at whose proxy the client of a request is.
func doorPartyFrom(ctx context.Context) (wire.Party, bool) {
	p, ok := ctx.Value(doorPartyKey{}).(wire.Party)
	return p, ok
}

// doorConn is a connection of a client at the proxy of a party of ours. Which
// party that is says the session that it came through, not the client.
type doorConn struct {
	net.Conn
	r     *bufio.Reader
	party wire.Party
	once  sync.Once
	done  chan struct{} // closed with it
}

func (c *doorConn) Read(b []byte) (int, error) { return c.r.Read(b) }

func (c *doorConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.done) })
	return err
}

// partyOfConn finds the party below TLS.
func partyOfConn(c net.Conn) (wire.Party, bool) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	d, ok := c.(*doorConn)
	if !ok {
		return wire.Party{}, false
	}
	return d.party, true
}

// admit serves a stream to a client at a party's proxy, and returns when it
// has ended. The client speaks TLS, or plain HTTP for what carries its own
// signature.
func (d *doorway) admit(ctx context.Context, party wire.Party, stream net.Conn) {
	c := &doorConn{Conn: stream, r: bufio.NewReader(stream), party: party, done: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := stream.SetReadDeadline(time.Now().Add(doorHello)); err != nil {
		_ = c.Close()
		return
	}
	first, err := c.r.Peek(1)
	if err != nil || stream.SetReadDeadline(time.Time{}) != nil {
		_ = c.Close()
		return
	}
	const tlsHandshake = 0x16 // RFC 8446, 5.1
	var conn net.Conn = c
	if first[0] == tlsHandshake {
		conn = tls.Server(c, d.tlsConfig(&tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}, GetCertificate: d.certificate}))
	}
	if !d.proxied.put(ctx, conn) {
		_ = c.Close()
		return
	}
	<-c.done
}

// tlsConfig adds what the doors need of a listener: EST clients may show the
// certificate that they have. What it is worth is decided there; nothing else
// looks at it.
func (d *doorway) tlsConfig(cfg *tls.Config) *tls.Config {
	if d == nil {
		return cfg
	}
	next := cfg.GetCertificate
	cfg.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if hello.ServerName == d.s.cfg.DoorsName {
			return d.certificate(hello)
		}
		return next(hello)
	}
	if d.est == nil {
		return cfg
	}
	cfg.ClientAuth = tls.RequestClientCert
	plain := cfg.Clone()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := plain.Clone()
		c.ClientCAs = x509.NewCertPool() // named to clients, so that they show no other
		for _, issuer := range d.ca.Doors() {
			c.ClientCAs.AddCert(issuer)
		}
		return c, nil
	}
	return cfg
}

// gaveUp makes the doors show a new certificate if the one that was revoked is
// their own.
func (d *doorway) gaveUp(c *store.Certificate) {
	if d == nil || c.Door != doorSelf {
		return
	}
	d.certMu.Lock()
	defer d.certMu.Unlock()
	if d.cert != nil && doors.Serial(d.cert.Leaf.SerialNumber) == c.Serial {
		d.cert = nil
	}
}

// ownCertificate makes a key and a certificate for the doors' own name;
// d.certMu is held.
func (d *doorway) ownCertificate(ctx context.Context) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx) // the next client needs it too
	chain, err := d.ca.Issue(ctx, doors.Request{CSR: csr, Names: []string{d.s.cfg.DoorsName}})
	if err != nil {
		return nil, err
	}
	if err := d.record(ctx, doorSelf, chain[0], "", nil); err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}

// connQueue is a listener whose connections somebody else opened.
type connQueue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newConnQueue() *connQueue {
	return &connQueue{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (q *connQueue) put(ctx context.Context, c net.Conn) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.closed:
	case <-ctx.Done():
	}
	return false
}

// Accept waits for the next connection.
func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *connQueue) close() { q.once.Do(func() { close(q.closed) }) }

// Close ends Accept.
func (q *connQueue) Close() error {
	q.close()
	return nil
}

// Addr is not one that could be dialled.
func (q *connQueue) Addr() net.Addr { return proxyAddr{} }

type proxyAddr struct{}

func (proxyAddr) Network() string { return "sallyport" }
func (proxyAddr) String() string  { return "the proxies of nodes and RCPs" }
