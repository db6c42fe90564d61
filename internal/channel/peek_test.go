package channel

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// pieces is a connection of which one can only read.
type pieces struct {
	net.Conn
	r io.Reader
}

func (p pieces) Read(b []byte) (int, error) { return p.r.Read(b) }

// FuzzRecords reads a stream of records in pieces of any size: all of it
// comes, and no read goes beyond a record.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("\x16\x03\x01\x00\x02ab\x17\x03\x03\x00\x00\x17\x03\x03\x00\x01c"), byte(7))
	f.Add([]byte("\x17\x03"), byte(1))
	f.Fuzz(func(t *testing.T, stream []byte, size byte) {
		if len(stream) == 0 {
			return
		}
		p := &peekedConn{Conn: pieces{r: bytes.NewReader(stream[1:])}, head: stream[:1], exact: &records{}}
		var ends []int // where headers and records end
		for at := 0; at < len(stream); {
			at += 5
			ends = append(ends, at)
			if at > len(stream) {
				break
			}
			if n := int(binary.BigEndian.Uint16(stream[at-2:])); n > 0 {
				at += n
				ends = append(ends, at)
			}
		}
		var got []byte
		buf := make([]byte, int(size)+1)
		for {
			n, err := p.Read(buf)
			before := len(got)
			got = append(got, buf[:n]...)
			for _, end := range ends {
				if before < end && end < len(got) {
					t.Errorf("a read of %d bytes from %d on goes beyond %d", n, before, end)
				}
			}
			if err != nil {
				break
			}
		}
		if !bytes.Equal(got, stream) {
			t.Errorf("got %d bytes of %d", len(got), len(stream))
		}
	})
}
