package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// carriers are the connections that a tunnel is tested on.
var carriers = map[string]func(testing.TB) (client, server net.Conn, cBelow, sBelow *Batch){
	"pipe": func(testing.TB) (net.Conn, net.Conn, *Batch, *Batch) {
		a, b := net.Pipe()
		return a, b, nil, nil
	},
	"tcp": func(tb testing.TB) (net.Conn, net.Conn, *Batch, *Batch) {
		a, b := tcpPair(tb)
		return a, b, nil, nil
	},
	"tls on pipe": func(tb testing.TB) (net.Conn, net.Conn, *Batch, *Batch) {
		return tlsPair(tb, net.Pipe)
	},
	"tls on tcp": func(tb testing.TB) (net.Conn, net.Conn, *Batch, *Batch) {
		return tlsPair(tb, func() (net.Conn, net.Conn) { return tcpPair(tb) })
	},
}

func tcpPair(tb testing.TB) (client, server net.Conn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		tb.Fatal(err)
	}
	return client, server
}

var testCert = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"peer"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
})

func tlsRoots() *x509.CertPool {
	roots := x509.NewCertPool()
	roots.AddCert(testCert().Leaf)
	return roots
}

// tlsPair shakes hands over a pair of connections, each below a Batch.
func tlsPair(tb testing.TB, pair func() (net.Conn, net.Conn)) (client, server net.Conn, cBelow, sBelow *Batch) {
	tb.Helper()
	cert, roots := testCert(), tlsRoots()
	a, b := pair()
	cBelow, sBelow = NewBatch(a), NewBatch(b)
	c := tls.Client(cBelow, &tls.Config{RootCAs: roots, ServerName: "peer", MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true})
	s := tls.Server(sBelow, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true})
	shaken := make(chan error, 1)
	go func() { shaken <- s.Handshake() }()
	if err := c.Handshake(); err != nil {
		tb.Fatal(err)
	}
	if err := <-shaken; err != nil {
		tb.Fatal(err)
	}
	return c, s, cBelow, sBelow
}

// world is a tunnel between two ends that run.
type world struct {
	client, server *Tunnel
	ended          chan error // of both Runs
	stop           context.CancelFunc
	wg             sync.WaitGroup
}

func newWorld(tb testing.TB, carrier string, h Handler, cfg Config) *world {
	tb.Helper()
	a, b, below, sBelow := carriers[carrier](tb)
	ctx, cancel := context.WithCancel(context.Background())
	w := &world{client: Client(a, below, cfg), server: Server(b, sBelow, h, cfg), ended: make(chan error, 2), stop: cancel}
	w.wg.Go(func() { w.ended <- w.client.Run(ctx) })
	w.wg.Go(func() { w.ended <- w.server.Run(ctx) })
	tb.Cleanup(w.close)
	return w
}

func (w *world) close() {
	w.stop()
	_ = w.client.Close()
	_ = w.server.Close()
	w.wg.Wait()
}

func (w *world) open(tb testing.TB, target string) *Stream {
	tb.Helper()
	s, err := w.client.Open(target)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

func TestStreamIsAConn(t *testing.T) {
	for carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				served := make(chan *Stream)
				hold := make(chan struct{})
				w := newWorld(t, carrier, func(_ context.Context, _ string, s *Stream) {
					served <- s
					<-hold
				}, Config{})
				s := w.open(t, "somewhere")
				s.announce()
				return s, <-served, func() {
					close(hold)
					w.close()
				}, nil
			})
		})
	}
}
