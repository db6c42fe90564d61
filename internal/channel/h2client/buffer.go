package h2client

import "sync"

// piece is a part of what a stream has received and nobody has read yet. It
// comes from the pool of its size, so that a line of signals does not hold what
// a frame of bulk does.
type piece struct {
	b    []byte
	r, w int
	next *piece
}

var (
	pieceSizes = [...]int{512, 4 << 10, maxFrame}
	pieces     [len(pieceSizes)]sync.Pool
)

func takePiece(n int) *piece {
	for i, size := range pieceSizes {
		if n <= size || i == len(pieceSizes)-1 {
			if p, ok := pieces[i].Get().(*piece); ok {
				return p
			}
			return &piece{b: make([]byte, size)}
		}
	}
	return nil // not reached
}

func (p *piece) release() {
	p.r, p.w, p.next = 0, 0, nil
	for i, size := range pieceSizes {
		if len(p.b) == size {
			pieces[i].Put(p)
		}
	}
}

// buffer is what a stream has received and not read. All of it is guarded by
// the connection's lock but the room that is being filled.
type buffer struct {
	first, last *piece
	filling     bool // the read loop reads into last
	dropped     bool // nobody is going to read
	n           int
}

// room returns where up to n bytes can be put; filled must follow. Nobody asks
// for room once the buffer was dropped.
func (b *buffer) room(n int) []byte {
	if b.last == nil {
		b.first = takePiece(n)
		b.last = b.first
	} else if b.last.w == len(b.last.b) {
		b.last.next = takePiece(n)
		b.last = b.last.next
	}
	b.filling = true
	return b.last.b[b.last.w:min(len(b.last.b), b.last.w+n)]
}

func (b *buffer) filled(n int) {
	b.filling = false
	b.last.w += n
	b.n += n
	if b.last == b.first {
		b.trim()
	}
}

// read takes bytes of the first pieces, and gives those back that are empty.
func (b *buffer) read(p []byte) (n int) {
	for n < len(p) && b.first != nil && b.first.r < b.first.w {
		k := copy(p[n:], b.first.b[b.first.r:b.first.w])
		b.first.r += k
		n += k
		b.trim()
	}
	b.n -= n
	return n
}

// trim gives the first piece back when it is read, unless it is being filled.
func (b *buffer) trim() {
	f := b.first
	if f.r < f.w || f == b.last && b.filling {
		return
	}
	if b.first = f.next; b.first == nil {
		b.last = nil
	}
	f.release()
}

// drop forgets what is unread and what still comes; it returns how much that was.
func (b *buffer) drop() (n int) {
	n, b.n, b.dropped = b.n, 0, true
	for b.first != nil && (b.first != b.last || !b.filling) {
		f := b.first
		b.first = f.next
		f.release()
	}
	if b.first == nil {
		b.last = nil
	}
	return n
}
