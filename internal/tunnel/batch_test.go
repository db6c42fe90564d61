package tunnel

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
)

// A resting Batch hands over whole records that came, and waits for none.
func TestBatchRests(t *testing.T) {
	client, server := tcpPair(t)
	defer func() { _, _ = client.Close(), server.Close() }()
	b := NewBatch(server)
	buf := make([]byte, 100)
	b.Rest(true)
	if n, err := b.Read(buf); n != 0 || !errors.Is(err, ErrResting) {
		t.Errorf("read %d, %v where nothing came", n, err)
	}
	b.Rest(false)
	records := []string{"\x17\x03\x03\x00\x03abc", "\x17\x03\x03\x00\x01d", "\x17\x03\x03\x00\x05ef"} // the last one is cut short
	if _, err := io.WriteString(client, records[0]+records[1]+records[2]); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(); err != nil {
		t.Fatal(err)
	}
	for b.w < len(records[0]+records[1]+records[2]) { // it comes in one piece as a rule
		if err := b.fill(); err != nil {
			t.Fatal(err)
		}
	}
	b.Rest(true)
	for _, want := range records[:2] {
		if n, err := b.Read(buf[:5]); err != nil || string(buf[:n]) != want[:5] {
			t.Errorf("header: %q, %v", buf[:n], err)
		}
		if n, err := b.Read(buf); err != nil || string(buf[:n]) != want[5:] {
			t.Errorf("got %q, %v; want %q", buf[:n], err, want[5:])
		}
	}
	if n, err := b.Read(buf); n != 0 || !errors.Is(err, ErrResting) || b.in == nil {
		t.Errorf("read %d, %v of a record that is not whole", n, err)
	}
	if err := b.Wait(); err != nil { // something is there
		t.Error(err)
	}
	b.Rest(false)
	if _, err := io.WriteString(client, "ghi"); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for len(got) < 10 {
		n, err := b.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	if string(got) != records[2]+"ghi" || b.in != nil {
		t.Errorf("got %q, buffer kept: %v", got, b.in != nil)
	}
	_ = client.Close()
	if err := b.Wait(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// waiter is a connection that says when there is something to read.
type waiter struct {
	net.Conn
	buf   bytes.Buffer
	waits int
}

func (w *waiter) Wait() error {
	w.waits++
	if w.buf.Len() == 0 {
		return io.EOF
	}
	return nil
}

func (w *waiter) Read(p []byte) (int, error) { return w.buf.Read(p) }

// A connection that can wait is read in large pieces, and without a buffer
// while it waits.
func TestBatchOnAWaiter(t *testing.T) {
	w := &waiter{}
	record := append([]byte("\x17\x03\x03\x40\x00"), make([]byte, 16<<10)...)
	for range 8 {
		w.buf.Write(record)
	}
	b := NewBatch(w)
	buf := make([]byte, 64<<10)
	for i := range 8 {
		n, err := b.Read(buf)
		if err != nil || n != len(record) {
			t.Fatalf("record %d: %d bytes, %v", i, n, err)
		}
	}
	if w.waits != 1 || b.in != nil {
		t.Errorf("%d waits, buffer kept: %v", w.waits, b.in != nil)
	}
	if n, err := b.Read(buf); n != 0 || !errors.Is(err, io.EOF) || b.in != nil {
		t.Errorf("at the end: %d, %v, buffer kept: %v", n, err, b.in != nil)
	}
}
