package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// handshakes measures mutual TLS 1.3 handshakes as channels and sessions make
// them: P-256 leaves behind an intermediate, both sides in this process, over
// loopback. With the hybrid key exchange that Go offers by default, and without,
// which is what GODEBUG=tlsmlkem=0 makes of it.
func (b *bench) handshakes(ctx context.Context) error {
	chain, err := newChain()
	if err != nil {
		return err
	}
	kinds := []struct {
		rate, cpu, bytes string
		curves           []tls.CurveID
		resume           bool
	}{
		{"handshake.hybrid", "handshake.hybrid.cpu", "handshake.hybrid.bytes", nil, false},
		{"handshake.classic", "handshake.classic.cpu", "handshake.classic.bytes", []tls.CurveID{tls.X25519}, false},
		{"", "handshake.resumed.cpu", "", nil, true},
	}
	rates, costs, sizes := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for range b.rounds {
		for _, k := range kinds {
			n, cpu, size, took, err := chain.shakeFor(ctx, b.time/2, k.curves, k.resume)
			if err != nil {
				return err
			}
			rates[k.rate] = append(rates[k.rate], float64(n)/took.Seconds())
			costs[k.cpu] = append(costs[k.cpu], perOperation(cpu, n))
			sizes[k.bytes] = append(sizes[k.bytes], float64(size)/float64(n))
		}
	}
	for _, k := range kinds {
		b.put(k.cpu, costs[k.cpu]...)
		b.say("%s: %.0f µs CPU of both sides", k.cpu, median(costs[k.cpu]))
		if k.rate != "" {
			b.put(k.rate, rates[k.rate]...)
			b.put(k.bytes, sizes[k.bytes]...)
		}
	}
	return nil
}

// chain is a root and two parties behind an intermediate.
type chain struct {
	roots          *x509.CertPool
	client, server tls.Certificate
}

func newChain() (*chain, error) {
	now := time.Now()
	type signer struct {
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}
	serial := int64(0)
	issue := func(by *signer, name string, ca bool) (*signer, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		serial++
		t := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
		if ca {
			t.IsCA, t.KeyUsage, t.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
		} else {
			t.DNSNames = []string{name}
		}
		parent := signer{t, key}
		if by != nil {
			parent = *by
		}
		der, err := x509.CreateCertificate(rand.Reader, t, parent.cert, key.Public(), parent.key)
		if err != nil {
			return nil, err
		}
		cert, err := x509.ParseCertificate(der)
		return &signer{cert, key}, err
	}
	root, err := issue(nil, "root", true)
	if err != nil {
		return nil, err
	}
	middle, err := issue(root, "intermediate", true)
	if err != nil {
		return nil, err
	}
	c := &chain{roots: x509.NewCertPool()}
	c.roots.AddCert(root.cert)
	for name, to := range map[string]*tls.Certificate{"client": &c.client, "server": &c.server} {
		leaf, err := issue(middle, name+".example.sallyport", false)
		if err != nil {
			return nil, err
		}
		*to = tls.Certificate{Certificate: [][]byte{leaf.cert.Raw, middle.cert.Raw}, PrivateKey: leaf.key, Leaf: leaf.cert}
	}
	return c, nil
}

// countedConn counts what is written.
type countedConn struct {
	net.Conn
	n *atomic.Int64
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// shakeFor makes handshakes, one after the other, for d.
func (c *chain) shakeFor(ctx context.Context, d time.Duration, curves []tls.CurveID, resume bool) (n int, cpu time.Duration, size int64, took time.Duration, err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, 0, 0, 0, err
	}
	defer func() { _ = l.Close() }()
	var wrote atomic.Int64
	server := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.server}, ClientCAs: c.roots,
		ClientAuth: tls.RequireAndVerifyClientCert, CurvePreferences: curves}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s := tls.Server(countedConn{conn, &wrote}, server)
			var one [1]byte
			if _, err := s.Read(one[:]); err == nil {
				_, _ = s.Write(one[:]) // the client fails otherwise
			}
			_ = s.Close()
		}
	}()
	client := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.client}, RootCAs: c.roots,
		ServerName: "server.example.sallyport", CurvePreferences: curves}
	if resume {
		client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	}
	shake := func() error {
		conn, err := dial(ctx, l.Addr().String())
		if err != nil {
			return err
		}
		t := tls.Client(countedConn{conn, &wrote}, client)
		defer func() { _ = t.Close() }()
		var one [1]byte
		if _, err := t.Write(one[:]); err != nil {
			return err
		}
		if _, err := t.Read(one[:]); err != nil { // the server has verified us, and its ticket was read
			return err
		}
		if resume && n > 0 && !t.ConnectionState().DidResume {
			return errors.New("the session was not resumed")
		}
		return nil
	}
	if err := shake(); err != nil {
		return 0, 0, 0, 0, fmt.Errorf("handshake: %w", err)
	}
	before, err := ownCPU()
	if err != nil {
		return 0, 0, 0, 0, err
	}
	wrote.Store(0)
	began := time.Now()
	for n = 0; n == 0 || time.Since(began) < d; n++ {
		if err := shake(); err != nil {
			return n, 0, 0, 0, fmt.Errorf("handshake %d: %w", n, err)
		}
	}
	took = time.Since(began)
	after, err := ownCPU()
	return n, after - before, wrote.Load(), took, err
}

// ownCPU is user and system time of this process.
func ownCPU() (time.Duration, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0, fmt.Errorf("getrusage: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}
