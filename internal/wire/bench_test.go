package wire

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// BenchmarkOutboxLine is the codec of one event of 250 bytes between node and gateway.
func BenchmarkOutboxLine(b *testing.B) {
	up := OutboxUp{Event: &Event{ID: NewID(), Seq: 123456789, Time: time.Now().UTC(), Severity: SeverityMajor,
		Application: "bench", Object: "/dev/sda1", Key: "disk", Text: strings.Repeat("x", 250)}}
	line, err := AppendLine(nil, up)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(line)))
		buf := make([]byte, 0, 2*len(line))
		for b.Loop() {
			if _, err := AppendLine(buf[:0], up); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(line)))
		many := bytes.Repeat(line, 1000)
		r := NewLineReader(bytes.NewReader(many), MaxFrameLine)
		left := 1000
		for b.Loop() {
			if left == 0 {
				r, left = NewLineReader(bytes.NewReader(many), MaxFrameLine), 1000
			}
			left--
			var got OutboxUp
			if err := r.Next(&got); err != nil {
				b.Fatal(err)
			}
		}
	})
}
