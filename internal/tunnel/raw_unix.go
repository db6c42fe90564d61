//go:build unix

package tunnel

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// rawIO tells whether sockets can be read and written without waiting.
const rawIO = true

// tryRead is called when the socket may be readable, and tells whether the
// read is over.
func (s *socket) tryRead(fd uintptr) bool {
	fresh := s.in == nil
	if fresh {
		s.in = batches.Get().(*[]byte)
	}
	n, err := readFD(fd, (*s.in)[s.from:batchSize])
	if n > 0 {
		s.n = n
		return true
	}
	if fresh {
		batches.Put(s.in)
		s.in = nil
	}
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return false
	case err == nil:
		s.readErr = io.EOF
	default:
		s.readErr = os.NewSyscallError("read", err)
	}
	return true
}

// tryWrite is called when the socket may be writable, and tells whether the
// write is over.
func (s *socket) tryWrite(fd uintptr) bool {
	for len(s.out) > 0 {
		n, err := writeFD(fd, s.out)
		if n > 0 {
			s.out = s.out[n:]
			continue
		}
		if errors.Is(err, syscall.EAGAIN) {
			return !s.wait
		}
		s.writeErr = os.NewSyscallError("write", err)
		return true
	}
	return true
}

func readFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Read(int(fd), p)
		if err != syscall.EINTR {
			return n, err
		}
	}
}

func writeFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Write(int(fd), p)
		if err != syscall.EINTR {
			return n, err
		}
	}
}

// tryRead is as that of a socket, into a block.
func (from *source) tryRead(fd uintptr) bool {
	b := getBlock()
	n, err := readFD(fd, b.buf[headerLen:headerLen+from.room])
	if n > 0 {
		from.block, from.n = b, n
		return true
	}
	b.put()
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return false
	case err == nil:
		from.err = io.EOF
	default:
		from.err = os.NewSyscallError("read", err)
	}
	return true
}
