package tunnel

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Output works with a pen that one goroutine holds at a time. Whoever puts
// frames into the queue and finds the pen free writes them at once, so that a
// small message costs no change of goroutine. He never waits: where the socket
// takes no more, or others have queued more meanwhile, the pen goes to the
// tunnel's writing goroutine, which then finds a large batch.

// perStream is how many bytes of one stream may wait to be written.
const perStream = 256 << 10

var errFlood = fmt.Errorf("%w: it reads none of the answers that it causes", errFrame)

// frameLocked appends the header of a frame to the queue and returns the room
// for its payload of at most smallBlock bytes, to be filled before mu is given up.
func (t *Tunnel) frameLocked(h header) []byte {
	n := headerLen + h.n
	b := t.queue.tail
	if b == nil || b.room() < n {
		b = getBlock()
		t.queue.push(b)
	}
	return t.appendLocked(b, h, &t.queue)
}

func (t *Tunnel) appendLocked(b *block, h header, l *blockList) []byte {
	putHeader(b.buf[b.w:], h)
	b.w += headerLen + h.n
	if l != nil {
		l.n += headerLen + h.n
	}
	return b.buf[b.w-h.n : b.w]
}

// controlLocked appends a frame that may overtake others.
func (t *Tunnel) controlLocked(h header) []byte {
	if t.control == nil {
		t.control = getBlock()
	}
	if t.control.room() < headerLen+h.n {
		return t.frameLocked(h)
	}
	return t.appendLocked(t.control, h, nil)
}

// floodedLocked tells whether the peer makes us answer without reading the
// answers: what waits is more than the data of all streams may be.
func (t *Tunnel) floodedLocked() bool {
	return t.queue.n > maxAnswers+len(t.streams)*2*perStream
}

// resetLocked queues a reset behind what is queued of its stream.
func (t *Tunnel) resetLocked(id uint32, e *RefusedError) {
	var buf [1 + maxReason]byte
	payload := appendReset(buf[:0], e)
	copy(t.frameLocked(header{kindReset, id, len(payload)}), payload)
}

// window lets the peer send n more bytes on a stream.
func (t *Tunnel) window(id uint32, n int64) {
	t.mu.Lock()
	if t.err == nil && t.streams[id] != nil {
		binary.BigEndian.PutUint32(t.controlLocked(header{kindWindow, id, 4}), uint32(n))
	}
	flooded := t.floodedLocked()
	t.pushUnlock()
	if flooded {
		t.fail(errFlood)
	}
}

func (t *Tunnel) pendingLocked() bool {
	return t.control != nil || t.queue.head != nil || t.pong
}

// pushUnlock sees to it that what is queued is written, and gives mu up.
func (t *Tunnel) pushUnlock() {
	if t.pen || t.err != nil || !t.pendingLocked() {
		t.mu.Unlock()
		return
	}
	t.pen = true
	t.mu.Unlock()
	if t.below == nil || t.below.sock == nil {
		t.wake <- struct{}{}
		return
	}
	t.write(false)
}

// write writes what is queued; the caller holds the pen, which is free or in
// other hands afterwards. It waits for the socket only if it may.
func (t *Tunnel) write(wait bool) {
	for first := true; ; first = false {
		t.mu.Lock()
		t.accountLocked()
		if t.err != nil || !t.pendingLocked() {
			t.pen = false
			t.mu.Unlock()
			return
		}
		if !wait && !first {
			t.mu.Unlock()
			t.wake <- struct{}{}
			return
		}
		t.takeLocked()
		t.mu.Unlock()
		done, err := t.send(wait)
		if err != nil {
			t.fail(fmt.Errorf("write: %w", err))
			continue
		}
		if !done {
			t.wake <- struct{}{}
			return
		}
	}
}

// takeLocked moves about batchSize bytes from the queue into flight.
func (t *Tunnel) takeLocked() {
	if t.pong {
		t.pong = false
		copy(t.controlLocked(header{kindPong, 0, 8}), t.echo[:])
	}
	if c := t.control; c != nil {
		t.control = nil
		t.flight.push(c)
		// One record instead of two, if what follows is small.
		if b := t.queue.head; b != nil && b.w <= c.room() && b.w <= smallBlock {
			b = t.queue.pop()
			c.w += copy(c.buf[c.w:], b.bytes())
			c.parts = append(c.parts, b.parts...)
			t.flight.n += b.w
			b.put()
		}
	}
	for b := t.queue.head; b != nil && (t.flight.n == 0 || t.flight.n+b.w <= batchSize); b = t.queue.head {
		t.flight.push(t.queue.pop())
	}
}

// send writes what is in flight.
func (t *Tunnel) send(wait bool) (done bool, err error) {
	if t.below != nil {
		// Also where a flush was given up: what is in flight was sealed then.
		t.below.Hold()
	}
	for b := t.flight.head; b != nil && !b.sealed; b = b.next {
		if _, err := t.conn.Write(b.bytes()); err != nil {
			return true, err
		}
		b.sealed = true
	}
	if t.below == nil {
		return true, nil
	}
	return t.below.Flush(wait)
}

// accountLocked gives back what was written and lets its streams go on.
func (t *Tunnel) accountLocked() {
	for t.flight.head != nil {
		b := t.flight.pop()
		for _, p := range b.parts {
			p.s.writtenLocked(p.n)
		}
		b.put()
	}
}

// writeLoop takes the pen when it is handed over, and looks for signs of life.
func (t *Tunnel) writeLoop() {
	look := time.NewTicker(keepAlive)
	defer look.Stop()
	misses := 0
	for {
		select {
		case <-t.wake:
			t.writeOn()
		case <-look.C:
			misses = t.look(misses)
		case <-t.done:
			return
		}
	}
}

// writeOn takes over the pen, and what could not be flushed with it.
func (t *Tunnel) writeOn() {
	if t.flight.head != nil {
		if _, err := t.send(true); err != nil {
			t.fail(fmt.Errorf("write: %w", err))
		}
	}
	t.write(true)
}

// look asks a silent peer for a sign of life, and gives it up after two misses.
func (t *Tunnel) look(misses int) int {
	t.mu.Lock()
	if t.heard.Swap(false) || len(t.streams) == 0 {
		t.mu.Unlock()
		return 0
	}
	if misses++; misses > 2 {
		t.mu.Unlock()
		t.fail(ErrSilent)
		return misses
	}
	clear(t.controlLocked(header{kindPing, 0, 8}))
	t.pushUnlock()
	return misses
}
