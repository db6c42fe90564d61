package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// helperVariable makes this program a helper of the benchmark, a process of its
// own: "backend", or "joiner" and an address. Both write where they listen to
// the file that is their first argument.
const helperVariable = "BENCH_HELPER"

// helper serves until ctx ends.
func helper(ctx context.Context, kind string, args []string) error {
	if len(args) == 0 {
		return errors.New("a helper needs a file for its addresses")
	}
	switch {
	case kind == "backend":
		return backend(ctx, args[0])
	case kind == "joiner" && len(args) == 2:
		return joiner(ctx, args[0], args[1])
	}
	return fmt.Errorf("no helper %q with %d arguments", kind, len(args))
}

// startHelper starts a helper and returns where it listens.
func startHelper(ctx context.Context, dir, kind string, args ...string) (*process, []string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(dir, kind)
	p, err := startProcess(dir, kind+"-process", environment(helperVariable+"="+kind), self, append([]string{file}, args...)...)
	if err != nil {
		return nil, nil, err
	}
	var where []string
	err = eventually(ctx, 10*time.Second, "the "+kind+" listens", func() error {
		if err := p.ended(); err != nil {
			return err
		}
		b, err := os.ReadFile(file)
		where = strings.Fields(string(b))
		return err
	})
	return p, where, err
}

// announce writes addresses to a file, all at once.
func announce(file string, addresses ...string) error {
	if err := os.WriteFile(file+".new", []byte(strings.Join(addresses, "\n")), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// bulkBuffer is the size of reads and writes at both ends of bulk.
const bulkBuffer = 256 << 10

// addresses of the backend's services.
type addresses struct {
	sink   string // reads to the end and answers with the number of bytes, 8 bytes big endian
	source string // writes until the connection is closed
	http   string // answers every request with a small body
	echo   string // sends back what it reads
}

// backend is what the load reaches in the end. It is a process of its own, so
// that the load generator and what it measures do not share a scheduler.
func backend(ctx context.Context, file string) error {
	var names []string
	var wg sync.WaitGroup
	var listeners []net.Listener
	web := &http.Server{Handler: http.HandlerFunc(answer), ReadHeaderTimeout: time.Minute}
	serve := []func(net.Listener){tcp(sink), tcp(source), func(l net.Listener) { _ = web.Serve(l) }, tcp(echo)}
	for _, s := range serve {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
		names = append(names, l.Addr().String())
		wg.Go(func() { s(l) })
	}
	if err := announce(file, names...); err != nil {
		return err
	}
	<-ctx.Done()
	for _, l := range listeners {
		_ = l.Close()
	}
	_ = web.Close()
	return nil // connections end with the process
}

// tcp accepts and serves each connection.
func tcp(serve func(net.Conn)) func(net.Listener) {
	return func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				serve(c)
			}()
		}
	}
}

func sink(c net.Conn) {
	buf := make([]byte, bulkBuffer)
	var total uint64
	for {
		n, err := c.Read(buf)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			_, _ = c.Write(binary.BigEndian.AppendUint64(nil, total)) // the reader misses it otherwise
			return
		}
		if err != nil {
			return
		}
	}
}

func source(c net.Conn) {
	buf := pattern(bulkBuffer)
	for {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

func echo(c net.Conn) {
	buf := make([]byte, 4<<10)
	for {
		n, err := c.Read(buf)
		if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// smallBody is what one small HTTP request answers.
const smallBody = "{\"status\":\"ok\",\"load\":[0.12,0.08,0.05],\"uptime\":86400,\"checks\":[\"disk\",\"cpu\",\"swap\",\"ntp\"]}\n"

func answer(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, smallBody) // the client counts what is missing
}

// pattern is data that does not compress and does not repeat within a page.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint64(0x9E3779B97F4A7C15)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// startBackend starts the backend and reads where it listens.
func startBackend(ctx context.Context, dir string) (*process, addresses, error) {
	p, f, err := startHelper(ctx, dir, "backend")
	if err == nil && len(f) != 4 {
		err = fmt.Errorf("the backend has %d addresses", len(f))
	}
	if err != nil {
		return p, addresses{}, err
	}
	return p, addresses{f[0], f[1], f[2], f[3]}, nil
}

// joiner joins each connection with one to addr and does nothing else: io.Copy
// between two sockets, which the kernel splices. No RCP can carry bytes for
// less CPU time, so it is the floor under the RCP's.
func joiner(ctx context.Context, file, addr string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if err := announce(file, l.Addr().String()); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	tcp(func(c net.Conn) {
		other, err := dial(ctx, addr)
		if err != nil {
			return
		}
		defer func() { _ = other.Close() }()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = io.Copy(other, c) // the load counts what is missing
			_ = other.CloseWrite()
		})
		_, _ = io.Copy(c, other)
		_ = c.(*net.TCPConn).CloseWrite()
		wg.Wait()
	})(l)
	return nil
}
