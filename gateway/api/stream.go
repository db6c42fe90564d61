package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// maxStreamLine bounds one line of a live stream.
const maxStreamLine = 1 << 20

// ErrStop, returned by the function that a streaming call hands its items to,
// ends the call without an error.
var ErrStop = errors.New("stop")

// TailEvents hands every event after position after to f as it comes, in the
// order of positions, until ctx ends. With after < 0 it starts with the next
// event to come.
func (c *Client) TailEvents(ctx context.Context, q EventQuery, after int64, f func(Event) error) error {
	v := values("node", q.Node, "severity", q.Severity)
	if after >= 0 {
		v.Set("after", strconv.FormatInt(after, 10))
	}
	return stream(ctx, c, "/events/tail", v, func(e *Event) error { return f(*e) })
}

// FollowActions hands the output and the ends of a batch's actions to f, those
// that were there before included, and returns when all of them are done.
func (c *Client) FollowActions(ctx context.Context, batch string, f func(Output) error) error {
	return stream(ctx, c, "/actions/output", values("batch", batch, "follow", "true"), func(o *Output) error { return f(*o) })
}

// ActionOutput hands the output of one action to f; with follow it waits for
// the end of the action.
func (c *Client) ActionOutput(ctx context.Context, id string, follow bool, f func(Output) error) error {
	return stream(ctx, c, at("/actions", id, "output"), values("follow", strconv.FormatBool(follow)), func(o *Output) error { return f(*o) })
}

// WatchNodes hands every node to f as it is, then each that changes, until ctx
// ends.
func (c *Client) WatchNodes(ctx context.Context, q NodeQuery, f func(Node) error) error {
	return stream(ctx, c, "/nodes/watch", values("selector", q.Selector, "state", q.State), func(n *Node) error { return f(*n) })
}

// stream reads server-sent events (HTML Living Standard, section 9.2), whose
// data is the JSON of a T. A problem may come as an event of its own after the
// answer has begun. A stream that the server did not end with an "end" event
// was cut off, and returns io.ErrUnexpectedEOF.
func stream[T any](ctx context.Context, c *Client, path string, query url.Values, f func(*T) error) error {
	resp, err := c.request(ctx, http.MethodGet, path, query, nil, "text/event-stream")
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 0, 4<<10), maxStreamLine)
	var name string
	var data []byte
	for lines.Scan() {
		line := lines.Bytes()
		if len(line) > 0 {
			key, value, _ := bytes.Cut(line, []byte(":"))
			value = bytes.TrimPrefix(value, []byte(" "))
			switch string(key) {
			case "event":
				name = string(value)
			case "data":
				data = append(data, value...)
			}
			continue
		}
		if len(data) == 0 {
			continue // a keep-alive
		}
		switch name {
		case "end":
			return nil
		case "problem":
			var p Problem
			if err := json.Unmarshal(data, &p); err != nil {
				return fmt.Errorf("ask gateway: stream %s: %w", path, err)
			}
			return &p
		default:
			var item T
			if err := json.Unmarshal(data, &item); err != nil {
				return fmt.Errorf("ask gateway: stream %s: %w", path, err)
			}
			if err := f(&item); errors.Is(err, ErrStop) {
				return nil
			} else if err != nil {
				return err
			}
		}
		name, data = "", data[:0]
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("ask gateway: stream %s: %w", path, err)
}
