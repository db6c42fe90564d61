package simnode

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
)

// maxLine bounds one line of a log, in bytes: no record is nearly as long.
const maxLine = 16 << 20

// appendLog is a file that only grows. Many goroutines append and wait; one
// write and one fsync serve all that came meanwhile.
type appendLog struct {
	file *os.File

	mu       sync.Mutex
	waiting  []byte // appended, not yet written
	appended int64

	flush   sync.Mutex // held while writing; taken before mu
	spare   []byte
	durable int64
	err     error // of the first failure: nothing is written after it
}

// openLog reads a log line by line, cuts off a last line that a crash tore,
// and opens it for appending.
func openLog(name string, each func(line []byte) error) (*appendLog, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := readLines(f, each)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		_, err = f.Seek(size, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return &appendLog{file: f, appended: size, durable: size}, nil
}

// readLines returns the size of the whole lines.
func readLines(r io.Reader, each func([]byte) error) (size int64, err error) {
	in := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := readLine(in)
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return size, err
		}
		size += int64(len(line)) + 1
		if err := each(line); err != nil {
			return size, fmt.Errorf("at byte %d: %w", size, err)
		}
	}
}

// readLine returns io.EOF for a line without an end too: it was torn.
func readLine(in *bufio.Reader) ([]byte, error) {
	var long []byte
	for {
		part, err := in.ReadSlice('\n')
		if err == nil && long == nil {
			return part[:len(part)-1], nil
		}
		if len(long)+len(part) > maxLine {
			return nil, bufio.ErrTooLong
		}
		long = append(long, part...)
		switch {
		case err == nil:
			return bytes.TrimSuffix(long, []byte{'\n'}), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// append queues whole lines and returns what to pass to sync.
func (l *appendLog) append(lines []byte) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting = append(l.waiting, lines...)
	l.appended += int64(len(lines))
	return l.appended
}

// sync returns when everything up to a position is on disk.
func (l *appendLog) sync(upto int64) error {
	l.flush.Lock()
	defer l.flush.Unlock()
	if l.err != nil || l.durable >= upto {
		return l.err
	}
	l.mu.Lock()
	lines, to := l.waiting, l.appended
	l.waiting = l.spare[:0]
	l.mu.Unlock()
	if _, err := l.file.Write(lines); err != nil {
		l.err = err
		return err
	}
	if err := l.file.Sync(); err != nil {
		l.err = err
		return err
	}
	l.spare, l.durable = lines, to
	return nil
}

// size is what the log holds, written or not, in bytes.
func (l *appendLog) size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.appended
}

func (l *appendLog) close() error {
	err := l.sync(l.size())
	cerr := l.file.Close()
	if errors.Is(cerr, fs.ErrClosed) {
		cerr = nil
	}
	return errors.Join(err, cerr)
}
