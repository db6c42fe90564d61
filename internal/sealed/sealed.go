// Package sealed encrypts a stream under a passphrase, so that whoever steals a
// backup holds nothing without it and nobody can change it unseen.
//
// A sealed stream is a header and chunks. The header holds the cost of scrypt
// (RFC 7914) and a random salt; the key that scrypt makes of the passphrase and
// the salt encrypts this one stream. A chunk is 64 KiB of text, the last one
// less, under AES-256-GCM. Its nonce is its number and whether it is the last:
// chunks can be neither left out, nor moved, nor cut off (the STREAM
// construction of Hoang, Reyhanitabar, Rogaway and Vizár, 2015, as in age). The
// header is the additional data of every chunk.
package sealed

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/crypto/scrypt"
)

// Magic begins every sealed stream.
const Magic = "sallyport sealed 1\n"

const (
	saltSize   = 32
	headerSize = len(Magic) + 1 + saltSize // the one byte is the cost

	// Cost is the binary logarithm of scrypt's N: 128 MiB and about half a
	// second per guess. Readers take what the header says, up to maxCost
	// (1 GiB): the header is not authentic before the key is made.
	Cost = 17
	// MinCost is the least that a reader takes, for tests.
	MinCost = 10
	maxCost = 20

	chunkSize = 64 << 10
	tagSize   = 16
)

// Conditions that callers match.
var (
	// ErrFormat says that a stream is no sealed one.
	ErrFormat = errors.New("not a sealed file")
	// ErrOpen says that the passphrase is another one or that the stream was
	// changed: the two cannot be told apart.
	ErrOpen = errors.New("the passphrase is wrong, or the file is damaged")
)

// stream is the state that writer and reader share.
type stream struct {
	aead   cipher.AEAD
	header []byte
	count  uint64
}

func newStream(header, passphrase []byte) (*stream, error) {
	salt := header[len(header)-saltSize:]
	key, err := scrypt.Key(passphrase, salt, 1<<header[len(Magic)], 8, 1, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	return &stream{aead: aead, header: header}, err
}

// nonce of the next chunk: 3 zero bytes, 8 of its number, 1 that is set on the
// last.
func (s *stream) nonce(last bool) []byte {
	n := make([]byte, 12)
	binary.BigEndian.PutUint64(n[3:], s.count)
	if last {
		n[11] = 1
	}
	s.count++
	return n
}

// Writer seals what is written to it. Close writes the last chunk: without it
// the stream cannot be opened.
type Writer struct {
	*stream
	out  io.Writer
	buf  []byte
	done bool
}

// NewWriter writes the header and returns a Writer, which does not close out.
// cost is [Cost] but for tests.
func NewWriter(out io.Writer, passphrase []byte, cost byte) (*Writer, error) {
	header := append([]byte(Magic), cost)
	salt := make([]byte, saltSize)
	if _, err := rand.Read(salt); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	header = append(header, salt...)
	s, err := newStream(header, passphrase)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	if _, err := out.Write(header); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return &Writer{stream: s, out: out, buf: make([]byte, 0, chunkSize+tagSize)}, nil
}

// Write seals p; the last bytes of it may wait for the next Write or for Close.
func (w *Writer) Write(p []byte) (n int, err error) {
	if w.done {
		return 0, errors.New("seal: write after close")
	}
	for len(p) > 0 {
		if len(w.buf) == chunkSize { // more follows: it was not the last
			if err := w.flush(false); err != nil {
				return n, err
			}
		}
		took := min(chunkSize-len(w.buf), len(p))
		w.buf = append(w.buf, p[:took]...)
		p, n = p[took:], n+took
	}
	return n, nil
}

// Close writes the last chunk.
func (w *Writer) Close() error {
	if w.done {
		return nil
	}
	w.done = true
	return w.flush(true)
}

func (w *Writer) flush(last bool) error {
	_, err := w.out.Write(w.aead.Seal(w.buf[:0], w.nonce(last), w.buf, w.header))
	w.buf = w.buf[:0]
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	return nil
}

// Reader opens a sealed stream. Every byte that it returns is authentic; that
// nothing is missing at the end is certain only at io.EOF.
type Reader struct {
	*stream
	in    io.Reader
	next  []byte // the sealed chunk to open, and the byte after it that tells whether it is the last
	plain []byte
	err   error
}

// NewReader reads the header of in.
func NewReader(in io.Reader, passphrase []byte) (*Reader, error) {
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(in, header); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	} else if err != nil || !bytes.HasPrefix(header, []byte(Magic)) {
		return nil, ErrFormat
	}
	if c := header[len(Magic)]; c < MinCost || c > maxCost {
		return nil, fmt.Errorf("%w: it asks for scrypt with N = 2^%d, accepted is up to 2^%d", ErrFormat, c, maxCost)
	}
	s, err := newStream(header, passphrase)
	if err != nil {
		return nil, err
	}
	return &Reader{stream: s, in: in, next: make([]byte, 0, chunkSize+tagSize+1)}, nil
}

// Read opens the next chunk when the one before is used up.
func (r *Reader) Read(p []byte) (int, error) {
	for len(r.plain) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		r.plain, r.err = r.open()
	}
	n := copy(p, r.plain)
	r.plain = r.plain[n:]
	return n, nil
}

// open returns the next chunk; io.EOF with the last one.
func (r *Reader) open() ([]byte, error) {
	have := len(r.next)
	n, err := io.ReadFull(r.in, r.next[have:chunkSize+tagSize+1])
	last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !last {
		return nil, err
	}
	chunk := r.next[:have+n]
	var after []byte
	if !last {
		after = chunk[chunkSize+tagSize:]
		chunk = chunk[:chunkSize+tagSize]
	}
	plain, err := r.aead.Open(nil, r.nonce(last), chunk, r.header)
	if err != nil {
		return nil, ErrOpen
	}
	r.next = append(r.next[:0], after...)
	if last {
		return plain, io.EOF
	}
	return plain, nil
}
