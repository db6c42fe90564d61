package spool

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"sallyport/internal/wire"
)

// A record is, in little endian:
//
//	0   uint32  length of the body
//	4   uint32  CRC-32C of everything from byte 8, seeded with the segment's index
//	8   uint8   kind
//	9   uint64  position
//	17  body
//
// The seed makes a record of another file, left in a reused disk block, invalid.
const recordHeader = 17

// maxBody bounds a body: JSON may need six bytes for one of text.
const maxBody = 6*(wire.MaxEventText+4*wire.MaxEventField) + 1<<10

type kind uint8

const (
	kindEvent kind = 1 // body: severity rank, JSON of the event without its seq
	kindGap   kind = 2 // body: uint64 last position of the gap, reason
	kindMark  kind = 3 // body: see mark
)

var (
	errShort = errors.New("record is cut off")
	errBad   = errors.New("record is damaged")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type record struct {
	kind kind
	pos  int64
	body []byte // of the buffer that was parsed
}

// size is the number of bytes of the record on disk.
func (r record) size() int64 { return recordHeader + int64(len(r.body)) }

// last is the last position that the record covers; a mark covers none.
func (r record) last() int64 {
	switch r.kind {
	case kindGap:
		return int64(binary.LittleEndian.Uint64(r.body))
	case kindMark:
		return r.pos - 1
	}
	return r.pos
}

// severity is the rank of an event's severity in wire.Severities.
func (r record) severity() int { return int(r.body[0]) }

func (r record) reason() string {
	if r.body[8] == gapQuota {
		return "quota"
	}
	return "lost"
}

// Reasons of a gap on disk.
const (
	gapQuota = 1
	gapLost  = 2
)

// beginRecord appends an unfinished header; sealRecord completes the record
// once its body follows and its position is known.
func beginRecord(b []byte, k kind) []byte {
	b = append(b, make([]byte, recordHeader)...)
	b[len(b)-recordHeader+8] = byte(k)
	return b
}

func sealRecord(rec []byte, index uint64, pos int64) {
	binary.LittleEndian.PutUint32(rec, uint32(len(rec)-recordHeader))
	binary.LittleEndian.PutUint64(rec[9:], uint64(pos))
	binary.LittleEndian.PutUint32(rec[4:], checksum(rec[8:], index))
}

func checksum(b []byte, index uint64) uint32 {
	var seed [8]byte
	binary.LittleEndian.PutUint64(seed[:], index)
	return crc32.Update(crc32.Checksum(seed[:], castagnoli), castagnoli, b)
}

// parseRecord reads the record at the start of b. It returns errShort when b
// ends inside a record that may be good, errBad when no good record starts here.
func parseRecord(b []byte, index uint64) (record, error) {
	if len(b) < recordHeader {
		return record{}, errShort
	}
	n := binary.LittleEndian.Uint32(b)
	if n > maxBody {
		return record{}, errBad
	}
	if len(b) < recordHeader+int(n) {
		return record{}, errShort
	}
	rec := b[:recordHeader+int(n)]
	if binary.LittleEndian.Uint32(rec[4:]) != checksum(rec[8:], index) {
		return record{}, errBad
	}
	r := record{kind: kind(rec[8]), pos: int64(binary.LittleEndian.Uint64(rec[9:])), body: rec[recordHeader:]}
	ok := r.pos > 0
	switch r.kind {
	case kindEvent:
		ok = ok && len(r.body) > 1 && r.severity() < len(wire.Severities)
	case kindGap:
		ok = ok && len(r.body) == 9 && r.last() >= r.pos
	case kindMark:
		ok = ok && len(r.body) == markSize
	default:
		ok = false
	}
	if !ok {
		return record{}, errBad
	}
	return r, nil
}

// appendEvent appends an unsealed record of e. The seq stands in the header.
func appendEvent(b []byte, e wire.Event) ([]byte, error) {
	e.Seq = 0
	b = beginRecord(b, kindEvent)
	b = append(b, byte(slices.Index(wire.Severities, e.Severity)))
	body, err := json.Marshal(e)
	if err != nil {
		return b, fmt.Errorf("encode event: %w", err)
	}
	return append(b, body...), nil
}

func (r record) event(base int64) (wire.Event, error) {
	var e wire.Event
	if err := json.Unmarshal(r.body[1:], &e); err != nil {
		return e, fmt.Errorf("event at position %d: %w", r.pos, err)
	}
	e.Seq = r.pos - base
	return e, nil
}

func appendGap(b []byte, index uint64, from, to int64, reason byte) []byte {
	start := len(b)
	b = beginRecord(b, kindGap)
	b = binary.LittleEndian.AppendUint64(b, uint64(to))
	b = append(b, reason)
	sealRecord(b[start:], index, from)
	return b
}

// mark remembers across restarts how far the gateway may have been told. It is
// written when an outbox opens (open: anything after may have been sent too)
// and when it ends.
type mark struct {
	sent  int64 // highest position that may have been sent
	acked int64 // highest position that the gateway has
	open  bool
}

const markSize = 17

func appendMark(b []byte, index uint64, pos int64, m mark) []byte {
	start := len(b)
	b = beginRecord(b, kindMark)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.sent))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.acked))
	if m.open {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	sealRecord(b[start:], index, pos)
	return b
}

func (r record) mark() mark {
	return mark{
		sent:  int64(binary.LittleEndian.Uint64(r.body)),
		acked: int64(binary.LittleEndian.Uint64(r.body[8:])),
		open:  r.body[16] == 1,
	}
}

// header begins each segment:
//
//	0   "SPSPOOL1"
//	8   spool id, 16 bytes
//	24  uint64 index     of the segment; rises by one with each
//	32  int64  first     first position
//	40  int64  base      seq = position − base; the newest segment's id and base hold for all
//	48  uint64 tail      lowest index in use when the segment was made: lower ones are dead
//	56  int64  gone      events dropped by quota that no segment from tail on counts
//	64  int64  dropped   events dropped by quota from this segment
//	72  uint32 CRC-32C of the above
type header struct {
	spool                      [16]byte
	index, tail                uint64
	first, base, gone, dropped int64
}

const (
	headerSize  = 76
	headerMagic = "SPSPOOL1"
)

func (h header) append(b []byte) []byte {
	start := len(b)
	b = append(b, headerMagic...)
	b = append(b, h.spool[:]...)
	for _, v := range []uint64{h.index, uint64(h.first), uint64(h.base), h.tail, uint64(h.gone), uint64(h.dropped)} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func parseHeader(b []byte) (header, error) {
	var h header
	if len(b) < headerSize || string(b[:8]) != headerMagic {
		return h, errBad
	}
	if binary.LittleEndian.Uint32(b[72:]) != crc32.Checksum(b[:72], castagnoli) {
		return h, errBad
	}
	copy(h.spool[:], b[8:])
	h.index = binary.LittleEndian.Uint64(b[24:])
	h.first = int64(binary.LittleEndian.Uint64(b[32:]))
	h.base = int64(binary.LittleEndian.Uint64(b[40:]))
	h.tail = binary.LittleEndian.Uint64(b[48:])
	h.gone = int64(binary.LittleEndian.Uint64(b[56:]))
	h.dropped = int64(binary.LittleEndian.Uint64(b[64:]))
	if h.first < 1 || h.base < 0 || h.base >= h.first {
		return h, errBad
	}
	return h, nil
}
