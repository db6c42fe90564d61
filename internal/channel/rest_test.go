//go:build linux

package channel

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	mrand "math/rand/v2"
	"net"
	"testing"
	"time"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// torn writes in small pieces of any size, so that records arrive in parts and
// several at once.
type torn struct {
	net.Conn
	r *mrand.Rand
}

func (c torn) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		k := min(len(p), 1+c.r.IntN(700))
		k, err = c.Conn.Write(p[:k])
		p, n = p[k:], n+k
	}
	return n, err
}

// TestRestingConnNeverWaitsForWhatItHolds reads through TLS, and awaits before
// each read, however the records come and in whatever pieces they are read.
func TestRestingConnNeverWaitsForWhatItHolds(t *testing.T) {
	ca := identitytest.NewCA(t)
	cert, err := ca.Party(t, wire.RoleRCP).Certificate()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	raw, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 1<<20)
	_, _ = rand.Read(sent)
	seed := mrand.Uint64()
	t.Logf("seed %d", seed)
	wrote := make(chan error, 1)
	go func() {
		r := mrand.New(mrand.NewPCG(seed, 1))
		c := tls.Client(torn{raw, r}, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})
		var err error
		for rest := sent; len(rest) > 0 && err == nil; {
			k := min(len(rest), 1+r.IntN(40<<10))
			_, err = c.Write(rest[:k])
			rest = rest[k:]
		}
		wrote <- err
	}()
	if err := accepted.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	below, err := peek(accepted, 1)
	if err != nil {
		t.Fatal(err)
	}
	below.exact = &records{}
	server := tls.Server(below, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert}})
	if err := server.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	below.exact = nil
	c, ok := resting(server, below).(*restingConn)
	if !ok {
		t.Fatal("a TCP connection cannot rest")
	}
	r := mrand.New(mrand.NewPCG(seed, 2))
	var got []byte
	for len(got) < len(sent) {
		c.Await()
		buf := make([]byte, 1+r.IntN(20<<10))
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("after %d bytes: %v", len(got), err)
		}
		got = append(got, buf[:n]...)
	}
	if !bytes.Equal(got, sent) {
		t.Error("other bytes were read than were written")
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	// Nothing is left: now it waits, and the end of the connection wakes it.
	woke := make(chan struct{})
	go func() {
		defer close(woke)
		c.Await()
	}()
	select {
	case <-woke:
		t.Error("it does not wait although there is nothing to read")
	case <-time.After(50 * time.Millisecond):
	}
	_ = raw.Close()
	<-woke
}
