package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// ReadFrom implements [io.ReaderFrom]: it reads straight into what is sent. It
// waits for a bare socket without holding a buffer.
func (s *Stream) ReadFrom(r io.Reader) (total int64, err error) {
	from := sourceOf(r)
	for {
		room, err := s.reserve(MaxPayload)
		if err != nil {
			return total, err
		}
		b, n, err := from.read(room)
		s.unreserve(room - n)
		if n > 0 {
			total += int64(n)
			if err := s.sendBlock(b, n); err != nil {
				return total, err
			}
		} else if b != nil {
			b.put()
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// WriteTo implements [io.WriterTo]: it writes straight from what arrived.
func (s *Stream) WriteTo(w io.Writer) (total int64, err error) {
	s.announce()
	_, vectors := w.(*net.TCPConn)
	var bufs [8][]byte
	for {
		s.mu.Lock()
		if err := s.awaitLocked(1); err != nil {
			s.mu.Unlock()
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return total, err
		}
		var take blockList
		k := 0
		for ; k < len(bufs) && s.in.head != nil && take.n < batchSize; k++ {
			b := s.in.pop()
			bufs[k] = b.bytes()
			take.push(b)
		}
		s.mu.Unlock()
		n, err := writeAll(w, bufs[:k], vectors)
		clear(bufs[:k])
		take.drop()
		s.mu.Lock()
		more := s.tookLocked(int(n))
		s.mu.Unlock()
		if more > 0 {
			s.t.window(s.id, more)
		}
		total += n
		if err != nil {
			return total, err
		}
	}
}

func writeAll(w io.Writer, bufs net.Buffers, vectors bool) (total int64, err error) {
	if vectors && len(bufs) > 1 {
		return bufs.WriteTo(w)
	}
	for _, p := range bufs {
		n, err := w.Write(p)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// source reads blocks that begin with room for a header.
type source struct {
	r     io.Reader
	conn  net.Conn
	sock  *socket // of conn; nil: not a bare socket
	block *block
	room  int
	n     int
	err   error
}

func sourceOf(r io.Reader) *source {
	from := &source{r: r}
	if c, ok := r.(net.Conn); ok {
		if from.conn, from.sock = c, socketOf(c); from.sock != nil {
			from.sock.readInto = from.tryRead
		}
	}
	return from
}

// read returns a block with n bytes, at most room, behind the header; nil if
// there is none.
func (from *source) read(room int) (b *block, n int, err error) {
	if from.sock == nil {
		b = getBlock()
		n, err = from.r.Read(b.buf[headerLen : headerLen+room])
		return b, n, err
	}
	from.block, from.room, from.n, from.err = nil, room, 0, nil
	err = from.sock.raw.Read(from.sock.readInto)
	b, from.block = from.block, nil
	if err == nil && from.err != nil {
		if err = from.err; !errors.Is(err, io.EOF) { // as the connection's own Read says it
			err = &net.OpError{Op: "read", Net: from.conn.LocalAddr().Network(), Source: from.conn.LocalAddr(), Addr: from.conn.RemoteAddr(), Err: err}
		}
	}
	return b, from.n, err
}

// Join copies between a stream and a connection, both ways, until both have
// ended, or one way has failed, or ctx is done. Ends are passed on one by one,
// and so is a reset: the stream's becomes that of a TCP connection, and the
// other way round. It closes both. The error is that of the way that failed
// first, nil if both ended well.
func Join(ctx context.Context, s *Stream, conn net.Conn) (sent, received int64, err error) {
	var failed atomic.Pointer[error]
	var once sync.Once // whose second caller waits: nobody closes the connection before it is set to RST
	give := func(err error) {
		once.Do(func() {
			failed.Store(&err)
			s.Refuse(Reset, "") // nothing if it is the stream that failed
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // RST, not an end that looks complete
			}
			_ = conn.Close()
		})
	}
	stop := context.AfterFunc(ctx, func() { give(context.Cause(ctx)) })
	defer stop()
	// A stream can be over while we wait for the connection's next bytes.
	s.onStop(func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	back := make(chan struct{})
	var ended atomic.Bool // the connection's direction, in order
	s.t.spawn(func() {
		defer close(back)
		var err error
		if sent, err = s.ReadFrom(conn); err == nil {
			err = s.CloseWrite()
		}
		s.onStop(nil)
		if err == nil {
			ended.Store(true)
			return
		}
		if over := s.stopped(); over != nil {
			err = over
		}
		// After ErrStopped, what the other end sent is still on its way.
		if !errors.Is(err, ErrStopped) {
			give(err)
		}
	})
	received, err = s.WriteTo(conn)
	if err == nil && !ended.Load() { // where both have ended, closing it says so at once
		err = closeWrite(conn)
	}
	if err != nil {
		give(err)
	}
	<-back
	_ = s.Close()
	_ = conn.Close()
	if e := failed.Load(); e != nil {
		return sent, received, *e
	}
	return sent, received, nil
}

// closeWrite ends the direction to conn; one that cannot be ended alone is
// closed, so that its end is not waited for.
func closeWrite(conn net.Conn) error {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return conn.Close()
}
