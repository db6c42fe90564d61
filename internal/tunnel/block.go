package tunnel

import "sync"

// Sizes of blocks, in bytes.
const (
	// blockSize holds one data frame of the largest size, header included. It
	// is eight TLS records, so that bulk has no short ones. Against 64 KiB it
	// saves gateway and node a tenth of their CPU for bulk, and the RCP, which
	// is woken less often, a quarter; 256 KiB save no more.
	blockSize = 128 << 10
	// The smaller ones are for streams on which little arrives.
	middleBlock = 32 << 10
	smallBlock  = 4 << 10
)

// block is a piece of memory from a pool: frames on their way out, or bytes
// that arrived and nobody has read yet.
type block struct {
	buf    []byte
	r, w   int // what is in it is buf[r:w]
	next   *block
	parts  []part // of a block on its way out: whose bytes it holds
	sealed bool   // likewise: TLS has them
}

// part counts the bytes of one stream in a block.
type part struct {
	s *Stream
	n int
}

var (
	blocks       = sync.Pool{New: func() any { return &block{buf: make([]byte, blockSize)} }}
	middleBlocks = sync.Pool{New: func() any { return &block{buf: make([]byte, middleBlock)} }}
	smallBlocks  = sync.Pool{New: func() any { return &block{buf: make([]byte, smallBlock)} }}
)

func getBlock() *block { return blocks.Get().(*block) }

// getBlockFor returns a block with room for n bytes at least, or blockSize.
func getBlockFor(n int) *block {
	switch {
	case n <= smallBlock:
		return smallBlocks.Get().(*block)
	case n <= middleBlock:
		return middleBlocks.Get().(*block)
	}
	return getBlock()
}

func (b *block) put() {
	b.r, b.w, b.next, b.sealed = 0, 0, nil, false
	clear(b.parts)
	b.parts = b.parts[:0]
	switch len(b.buf) {
	case smallBlock:
		smallBlocks.Put(b)
	case middleBlock:
		middleBlocks.Put(b)
	default:
		blocks.Put(b)
	}
}

func (b *block) bytes() []byte { return b.buf[b.r:b.w] }
func (b *block) room() int     { return len(b.buf) - b.w }

// own notes that the last n bytes of a block on its way out are those of s.
func (b *block) own(s *Stream, n int) {
	if k := len(b.parts); k > 0 && b.parts[k-1].s == s {
		b.parts[k-1].n += n
		return
	}
	b.parts = append(b.parts, part{s, n})
}

// blockList is a queue of blocks.
type blockList struct {
	head, tail *block
	n          int // bytes in all of them
}

func (l *blockList) push(b *block) {
	if l.tail == nil {
		l.head = b
	} else {
		l.tail.next = b
	}
	l.tail = b
	l.n += b.w - b.r
}

func (l *blockList) pop() *block {
	b := l.head
	l.head = b.next
	if l.head == nil {
		l.tail = nil
	}
	b.next = nil
	l.n -= b.w - b.r
	return b
}

// drop gives everything back.
func (l *blockList) drop() {
	for l.head != nil {
		l.pop().put()
	}
}
