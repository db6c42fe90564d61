package simnode

import (
	"errors"
	"fmt"
	"io"
	"net/http"

	"sallyport/internal/wire"
)

// outbox serves POST /v1/outbox: events up, acknowledgements down, until the
// gateway ends its side.
func (n *node) outbox(w http.ResponseWriter, r *http.Request) {
	n.outboxes.Add(1)
	_ = n.pump(w, r) // what was not acknowledged is sent again
	if n.outboxes.Add(-1) == 0 && n.spool.state().Depth > 0 {
		n.kick() // what came after the gateway looked away
	}
}

func (n *node) pump(w http.ResponseWriter, r *http.Request) error {
	ctl := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	st := n.spool.state()
	line, err := wire.AppendLine(nil, wire.OutboxUp{State: &st})
	if err != nil {
		return err
	}
	if _, err := w.Write(line); err != nil {
		return err
	}
	if err := ctl.Flush(); err != nil {
		return err
	}
	down := wire.NewLineReader(r.Body, wire.MaxFrameLine)
	var first wire.OutboxDown
	if err := down.Next(&first); err != nil {
		return err
	}
	if first.Watermark == nil {
		return errors.New("the gateway's first line is no watermark")
	}
	if err := n.acked(*first.Watermark); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { // ends with the body
		defer close(ended)
		for {
			var l wire.OutboxDown
			if err := down.Next(&l); err != nil {
				return
			}
			if l.Ack == nil {
				continue
			}
			if err := n.acked(*l.Ack); err != nil {
				n.w.fail(err)
				return
			}
		}
	}()
	defer func() { _ = r.Body.Close(); <-ended }()
	pos := first.Watermark.Seq
	var buf []byte
	for {
		var more <-chan struct{}
		buf, pos, more = n.spool.after(pos, buf[:0], outboxChunk)
		if len(buf) > 0 {
			if _, err := w.Write(buf); err != nil {
				return err
			}
			if err := ctl.Flush(); err != nil {
				return err
			}
			continue
		}
		buf = nil // an idle outbox holds no buffer
		select {
		case <-more:
		case <-ended:
			return io.EOF
		case <-r.Context().Done():
			return r.Context().Err()
		}
	}
}

func (n *node) acked(m wire.OutboxMark) error {
	if m.Spool != n.spool.name {
		return nil
	}
	count, err := n.spool.ack(m.Seq)
	n.w.count.acked.Add(int64(count))
	if err != nil {
		return fmt.Errorf("%s: %w", n.name, err)
	}
	return nil
}
