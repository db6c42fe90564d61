package h2client

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2/hpack"
)

// fieldOverhead is what RFC 9113 section 6.5.2 adds to the size of each field.
const fieldOverhead = 32

// tableSizeZero is the dynamic table size update (RFC 7541 section 6.3) with
// which the first header block of a connection begins: we use no table.
const tableSizeZero = 0x20

// encoder makes header blocks that refer to nothing but the static table, so
// that one encoder serves all connections in turn.
type encoder struct {
	buf  bytes.Buffer
	enc  *hpack.Encoder
	size int // of the header list
	err  error
}

var encoders = sync.Pool{New: func() any {
	e := &encoder{}
	e.enc = hpack.NewEncoder(&e.buf)
	e.enc.SetMaxDynamicTableSize(0)
	e.field(":method", http.MethodGet) // with the size updates, which tableSizeZero stands for
	return e
}}

func (e *encoder) field(name, value string) {
	e.size += len(name) + len(value) + fieldOverhead
	if err := e.enc.WriteField(hpack.HeaderField{Name: name, Value: value}); err != nil {
		e.err = err
	}
}

// release gives the encoder back; its block must not be used any more.
func (e *encoder) release() {
	if e.buf.Cap() <= maxFrame {
		encoders.Put(e)
	}
}

// notSent are fields that HTTP/2 has not (RFC 9113 section 8.2.2), or that
// come from elsewhere.
var notSent = map[string]bool{"Host": true, "Content-Length": true, "Connection": true, "Proxy-Connection": true, "Transfer-Encoding": true,
	"Upgrade": true, "Keep-Alive": true}

// encode makes the header block of a request. length is that of its body; below
// 0 it is not known. limit is for the size of the header list.
func encode(req *http.Request, authority string, length int64, limit int) (*encoder, error) {
	e := encoders.Get().(*encoder)
	e.buf.Reset()
	e.size, e.err = 0, nil
	if err := e.request(req, authority, length, limit); err != nil {
		e.release()
		return nil, err
	}
	return e, nil
}

func (e *encoder) request(req *http.Request, authority string, length int64, limit int) error {
	method := req.Method
	if method == "" {
		method = http.MethodGet
	}
	if !httpguts.ValidHeaderFieldName(method) {
		return fmt.Errorf("method %q is not valid", method)
	}
	if method == http.MethodConnect {
		if authority = req.Host; authority == "" {
			authority = req.URL.Host
		}
	}
	if !httpguts.ValidHostHeader(authority) || authority == "" {
		return fmt.Errorf("authority %q is not valid", authority)
	}
	e.field(":authority", authority)
	e.field(":method", method)
	if method != http.MethodConnect { // RFC 9113 section 8.5
		path := req.URL.RequestURI()
		if !strings.HasPrefix(path, "/") && (path != "*" || method != http.MethodOptions) || !httpguts.ValidHeaderFieldValue(path) {
			return fmt.Errorf("path %q is not valid", path)
		}
		e.field(":path", path)
		e.field(":scheme", "https")
	}
	if err := e.fields(req.Header, limit); err != nil {
		return err
	}
	if length > 0 || length == 0 && (method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch) {
		e.field("content-length", strconv.FormatInt(length, 10))
	}
	if e.size > limit {
		return errListSize(e.size, limit)
	}
	return e.err
}

func errListSize(size, limit int) error {
	return fmt.Errorf("request %w: %d bytes, the limit is %d", ErrTooLarge, size, limit)
}

func (e *encoder) fields(h http.Header, limit int) error {
	for name, values := range h {
		if notSent[http.CanonicalHeaderKey(name)] {
			continue
		}
		if !httpguts.ValidHeaderFieldName(name) {
			return fmt.Errorf("header field name %q is not valid", name)
		}
		lower := strings.ToLower(name)
		for _, v := range values {
			switch {
			case lower == "te" && v != "trailers", lower == "user-agent" && v == "":
				continue
			case !httpguts.ValidHeaderFieldValue(v):
				return fmt.Errorf("value of header field %s is not valid", name)
			case e.size+len(lower)+len(v)+fieldOverhead > limit: // before it takes memory
				return errListSize(e.size+len(lower)+len(v)+fieldOverhead, limit)
			}
			e.field(lower, v)
		}
	}
	return nil
}

// decoder reads header blocks. As there is no dynamic table it keeps nothing
// from one block to the next, and one decoder serves all connections in turn.
type decoder struct {
	dec      *hpack.Decoder
	limit    int
	trailers bool

	size   int
	status int
	header http.Header
	length int64 // Content-Length; -1: none
	bad    string
}

var decoders = sync.Pool{New: func() any {
	d := &decoder{}
	d.dec = hpack.NewDecoder(0, d.field)
	return d
}}

// errBlock: the fields are not what a response is made of; the stream ends.
var errBlock = errors.New("malformed response")

// decode reads the header block of a response. An error that is an errBlock or
// ErrTooLarge is about one stream, any other about the connection.
func decode(block []byte, limit int, trailers bool) (status int, header http.Header, length int64, err error) {
	d := decoders.Get().(*decoder)
	d.limit, d.trailers, d.size, d.status, d.length, d.bad = limit, trailers, 0, 0, -1, ""
	d.header = make(http.Header)
	d.dec.SetMaxStringLength(limit)
	d.dec.SetEmitEnabled(true)
	_, err = d.dec.Write(block)
	if err == nil {
		err = d.dec.Close()
	}
	status, header, length = d.status, d.header, d.length
	size, bad := d.size, d.bad
	d.header = nil
	if err == nil { // else it has seen half of something, and goes too
		decoders.Put(d)
	}
	switch {
	case errors.Is(err, hpack.ErrStringLength), err == nil && size > limit:
		err = fmt.Errorf("response %w of %d bytes", ErrTooLarge, limit)
	case err != nil:
	case bad != "":
		err = fmt.Errorf("%w: %s", errBlock, bad)
	case status == 0 && !trailers:
		err = fmt.Errorf("%w: no :status", errBlock)
	case status != 0 && trailers:
		err = fmt.Errorf("%w: :status in trailers", errBlock)
	}
	return status, header, length, err
}

// field takes one field in. Once something is wrong, or too large, the rest is
// only read over.
func (d *decoder) field(f hpack.HeaderField) {
	if d.size += int(f.Size()); d.size > d.limit {
		d.dec.SetEmitEnabled(false)
		return
	}
	if d.bad != "" {
		return
	}
	if f.IsPseudo() {
		d.pseudo(f)
		return
	}
	if d.status == 0 && !d.trailers {
		d.bad = "a field comes before :status"
		return
	}
	for i := range len(f.Name) {
		if c := f.Name[i]; 'A' <= c && c <= 'Z' {
			d.bad = "field name in capitals"
			return
		}
	}
	if !httpguts.ValidHeaderFieldName(f.Name) || !httpguts.ValidHeaderFieldValue(f.Value) {
		d.bad = "invalid field"
		return
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade": // RFC 9113 section 8.2.2
		d.bad = "field " + f.Name
		return
	case "content-length":
		n, err := strconv.ParseUint(f.Value, 10, 63)
		if err != nil || d.length >= 0 && d.length != int64(n) {
			d.bad = "invalid content-length"
			return
		}
		d.length = int64(n)
	}
	name := http.CanonicalHeaderKey(f.Name)
	d.header[name] = append(d.header[name], f.Value)
}

func (d *decoder) pseudo(f hpack.HeaderField) {
	status, err := strconv.ParseUint(f.Value, 10, 16)
	switch {
	case f.Name != ":status":
		d.bad = "unknown pseudo-header"
	case d.status != 0:
		d.bad = "second :status"
	case len(d.header) > 0:
		d.bad = ":status after a field"
	case err != nil || len(f.Value) != 3 || status < 100:
		d.bad = "invalid :status"
	default:
		d.status = int(status)
	}
}
