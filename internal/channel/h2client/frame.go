package h2client

import "encoding/binary"

type frameType uint8

// RFC 9113 section 6.
const (
	frameData frameType = iota
	frameHeaders
	framePriority
	frameRSTStream
	frameSettings
	framePushPromise
	framePing
	frameGoAway
	frameWindowUpdate
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// RFC 9113 section 6.5.2.
const (
	settingHeaderTableSize      = 0x1
	settingEnablePush           = 0x2
	settingMaxConcurrentStreams = 0x3
	settingInitialWindowSize    = 0x4
	settingMaxFrameSize         = 0x5
	settingMaxHeaderListSize    = 0x6
)

const (
	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	frameHeaderLen = 9
	// maxFrame is the largest payload that we take, and send: the least that
	// RFC 9113 section 4.2 allows to ask for.
	maxFrame = 16 << 10
	// maxData is the payload with which a DATA frame and its header fill one TLS
	// record. A frame of 16 KiB takes two, the second one of 9 bytes.
	maxData = maxFrame - frameHeaderLen

	defaultWindow = 65535
	maxWindow     = 1<<31 - 1
	maxStreamID   = 1<<31 - 1

	// Until its SETTINGS have come, a peer is trusted with as many streams as
	// RFC 9113 section 6.5.2 asks every server to allow.
	initialMaxStreams = 100
)

type frameHeader struct {
	length int
	typ    frameType
	flags  uint8
	id     uint32
}

func (h frameHeader) has(flag uint8) bool { return h.flags&flag != 0 }

func parseFrameHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		typ:    frameType(b[3]),
		flags:  b[4],
		id:     binary.BigEndian.Uint32(b[5:]) & maxStreamID,
	}
}

func (h frameHeader) append(b []byte) []byte {
	b = append(b, byte(h.length>>16), byte(h.length>>8), byte(h.length), byte(h.typ), h.flags)
	return binary.BigEndian.AppendUint32(b, h.id)
}

func appendSetting(b []byte, id uint16, v uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, id), v)
}

func appendWindowUpdate(b []byte, id uint32, n int) []byte {
	b = frameHeader{length: 4, typ: frameWindowUpdate, id: id}.append(b)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendReset(b []byte, id uint32, code ErrCode) []byte {
	b = frameHeader{length: 4, typ: frameRSTStream, id: id}.append(b)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendPing(b []byte, flags uint8, data uint64) []byte {
	b = frameHeader{length: 8, typ: framePing, flags: flags}.append(b)
	return binary.BigEndian.AppendUint64(b, data)
}

func appendGoAway(b []byte, code ErrCode) []byte {
	b = frameHeader{length: 8, typ: frameGoAway}.append(b)
	b = binary.BigEndian.AppendUint32(b, 0) // no stream of the server was ever begun
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

// appendHeaders appends a header block in as many frames as it needs.
func appendHeaders(b []byte, id uint32, block []byte, end bool) []byte {
	typ, flags := frameHeaders, uint8(0)
	if end {
		flags = flagEndStream
	}
	for {
		n := min(len(block), maxFrame)
		if n == len(block) {
			flags |= flagEndHeaders
		}
		b = append(frameHeader{length: n, typ: typ, flags: flags, id: id}.append(b), block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return b
		}
		typ, flags = frameContinuation, 0
	}
}

// appendData appends a DATA frame; p is at most maxFrame long.
func appendData(b []byte, id uint32, p []byte, end bool) []byte {
	h := frameHeader{length: len(p), typ: frameData, id: id}
	if end {
		h.flags = flagEndStream
	}
	return append(h.append(b), p...)
}
