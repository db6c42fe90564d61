package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// Strangers who open connections leave room for those who come from elsewhere, and
// what they close is free again.
func TestConnectionsOfTheAPIAreBounded(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := newCrowd(ln, testLog(t))
	if c.limit < 1 || c.limit > maxAPIConns {
		t.Fatalf("a limit of %d", c.limit)
	}
	c.limit = 100
	accepted := make(chan net.Conn, 200)
	go func() {
		for {
			conn, err := c.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	for range 50 {
		dial()
	}
	last := dial()
	if err := last.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := last.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("half of all connections and one more: %v", err)
	}
	var mine []net.Conn
	for range 50 {
		mine = append(mine, <-accepted)
	}
	if other := netip.MustParsePrefix("192.0.2.1/32"); !c.enter(other) {
		t.Error("another source is kept out")
	}
	for range 2 { // once or twice is the same
		_ = mine[0].Close()
	}
	c.mu.Lock()
	n := c.all
	c.mu.Unlock()
	if n != 50 {
		t.Errorf("%d are counted", n)
	}
	again := dial()
	go func() { _, _ = io.WriteString(<-accepted, "x") }()
	if _, err := again.Read(make([]byte, 1)); err != nil {
		t.Errorf("in the place that is free again: %v", err)
	}
	_ = ln.Close()
}
