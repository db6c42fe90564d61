package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/tests/harness"
)

const (
	// strangersMost is what an RCP lets wait by default, and more than that come.
	strangersMost = 10_000
	strangersMore = 200
	// strangersLeast are too few to crowd anybody, so there is no test with fewer.
	strangersLeast = 500
	// spareFiles is what this process, or the RCP, has open besides their channels.
	spareFiles = 1000
	// strangersAt is how many of them shake hands at one time.
	strangersAt = 16
	// perSource is how many the RCP lets wait behind one address.
	perSource = 1000
)

// crowd are parties without a certificate that wait for one at an RCP, answer
// its pings, and let everything else hang.
type crowd struct {
	in      atomic.Int64 // their channels that live
	entered atomic.Int64 // that ever lived
	wg      sync.WaitGroup
}

// enter opens n channels from different addresses of loopback; they are held
// until ctx ends.
func (c *crowd) enter(ctx context.Context, addr string, n int) {
	turns := make(chan int)
	var entering sync.WaitGroup
	for range strangersAt {
		entering.Go(func() {
			for i := range turns {
				c.one(ctx, addr, net.IPv4(127, 0, 1, byte(1+i/perSource)))
			}
		})
	}
	for i := range n {
		select {
		case turns <- i:
		case <-ctx.Done():
		}
	}
	close(turns)
	entering.Wait()
}

// one is one stranger: it returns when it waits, or was turned away.
func (c *crowd) one(ctx context.Context, addr string, from net.IP) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return
	}
	d := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: from}},
		Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"sallyport-enroll/1"},
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return
	}
	// The dialler is the server of HTTP/2: it waits to be asked.
	if _, err := conn.Write(frame(frameSettings, 0, nil)); err != nil {
		_ = conn.Close()
		return
	}
	preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	if _, err := io.ReadFull(conn, preface); err != nil {
		_ = conn.Close()
		return
	}
	c.in.Add(1)
	c.entered.Add(1)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	c.wg.Go(func() {
		defer c.in.Add(-1)
		defer stop()
		defer func() { _ = conn.Close() }()
		wait(conn)
	})
}

// Frames of HTTP/2 (RFC 9113 section 4.1), as far as a stranger needs them.
const (
	frameSettings = 4
	framePing     = 6
	frameAck      = 1
)

func frame(kind, flags byte, payload []byte) []byte {
	return append([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, 0}, payload...)
}

// wait answers pings until the channel ends.
func wait(conn net.Conn) {
	r := bufio.NewReaderSize(conn, 256)
	var head [9]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		size := int64(head[0])<<16 | int64(head[1])<<8 | int64(head[2])
		kind, flags := head[3], head[4]
		var answer []byte
		switch {
		case kind == framePing && flags&frameAck == 0 && size == 8:
			var data [8]byte
			if _, err := io.ReadFull(r, data[:]); err != nil {
				return
			}
			size, answer = 0, frame(framePing, frameAck, data[:])
		case kind == frameSettings && flags&frameAck == 0:
			answer = frame(frameSettings, frameAck, nil)
		}
		if _, err := io.CopyN(io.Discard, r, size); err != nil {
			return
		}
		if answer != nil {
			if _, err := conn.Write(answer); err != nil {
				return
			}
		}
	}
}

// memory returns the resident memory of a process in MiB.
func memory(t *testing.T, p *harness.Process) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatalf("no VmRSS in %s", b)
	return 0
}

// strangers is how many can wait here: this process has a file for each, and so has
// the RCP, which inherits our limit.
func strangers(t *testing.T) int {
	t.Helper()
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	n := int(min(files.Max, 1<<20)) - spareFiles - strangersMore
	switch {
	case n < strangersLeast:
		t.Skipf("a process may open %d files here, and needs %d to be crowded at all", files.Max, strangersLeast+spareFiles+strangersMore)
	case n < strangersMost:
		t.Logf("a process may open %d files here: %d strangers instead of %d", files.Max, n, strangersMost)
		return n
	}
	return strangersMost
}

// TestStrangers: ten thousand strangers wait for a certificate at an RCP, and
// let the gateway's sessions hang. Real nodes work as before, a node with a
// code comes in, and the RCP keeps to its memory (PK-02, R-13).
func TestStrangers(t *testing.T) {
	harness.Long(t)
	many := strangers(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1", harness.Env("SALLYPORT_RCP_PENDING_MAX", strconv.Itoa(many)))
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	goesOn(t, site, gateway, node, "before")

	ctx, cancel := context.WithCancel(t.Context())
	c := &crowd{}
	defer c.wg.Wait()
	defer cancel()
	began := time.Now()
	c.enter(ctx, relay.Address, many+strangersMore)
	t.Logf("%d of %d strangers wait after %v", c.in.Load(), c.entered.Load(), time.Since(began).Round(time.Millisecond))
	harness.Eventually(t, 10*time.Second, "the RCP keeps to its limit", func() error {
		if n := int(c.in.Load()); n < many-100 || n > many {
			return fmt.Errorf("%d strangers wait, want %d", n, many)
		}
		return nil
	})
	working := func(text string) {
		t.Helper()
		began := time.Now()
		goesOn(t, site, gateway, node, text)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: a policy, an action and an event took %v", text, took)
		}
	}
	working("crowded")
	if rss := memory(t, relay.Process); rss > 1024 {
		t.Errorf("the RCP has %d MiB in memory, want less than 1024", rss)
	} else {
		t.Logf("the RCP has %d MiB in memory, the gateway %d", rss, memory(t, gateway.Process))
	}
	fresh := site.Node(gateway, "web-2", tagged("web-2"))
	t.Logf("a new node runs after %v", fresh.WaitRunning(30*time.Second).Round(time.Millisecond))
	goesOn(t, site, gateway, fresh, "in between")
	working("still crowded")
	if n := int(c.in.Load()); n < many-100 {
		t.Errorf("%d strangers are left", n)
	}
	rcps, err := gateway.RCPs()
	if err != nil || len(rcps) != 1 {
		t.Fatal(rcps, err)
	}
	if rcps[0].State != "connected" || rcps[0].StateSince.After(began) {
		t.Errorf("the RCP is %s since %v: %+v", rcps[0].State, rcps[0].StateSince, rcps[0])
	}
	if err := errors.Join(isRunning(gateway, "web-1"), isRunning(gateway, "web-2")); err != nil {
		t.Error(err)
	}
}

func isRunning(gateway *harness.Gateway, name string) error {
	n, err := gateway.Node(name)
	if err == nil && n.State != "running" {
		err = fmt.Errorf("%s is %s (%s)", name, n.State, n.StateReason)
	}
	return err
}
