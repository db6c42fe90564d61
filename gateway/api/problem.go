package api

import (
	"errors"
	"net/http"
	"strings"
)

// Code is the machine-readable reason of a refusal.
type Code string

// The codes. Each goes with one HTTP status.
const (
	CodeInvalid      Code = "invalid"         // 422: the request makes no sense; Errors says where
	CodeMalformed    Code = "malformed"       // 400: not even parsable
	CodeUnauthorized Code = "unauthenticated" // 401: no valid token
	CodeForbidden    Code = "forbidden"       // 403: the caller's role does not allow it
	CodeNotFound     Code = "not-found"       // 404
	CodeMethod       Code = "wrong-method"    // 405: the path is for other methods; Allow names them
	CodeAmbiguous    Code = "ambiguous"       // 409: a prefix or name fits several objects
	CodeNameInUse    Code = "name-in-use"     // 409
	CodeExists       Code = "exists"          // 409
	CodeConflict     Code = "conflict"        // 409: the object's state does not allow it
	CodeChanged      Code = "changed"         // 412: If-Match does not fit; somebody was faster
	CodeTooLarge     Code = "too-large"       // 413
	CodeLocked       Code = "locked-out"      // 429: too many bad tokens; Retry-After says how long
	CodeBusy         Code = "busy"            // 429: too much of it runs at once: live streams of a caller or of all, requests to a target
	CodeUnsupported  Code = "unsupported"     // 422: known, but not supported yet
	CodeFailed       Code = "target-failed"   // 502: what a request was relayed to failed
	CodeUnavailable  Code = "unavailable"     // 503: for instance, the node is not connected
	CodeTimeout      Code = "timeout"         // 504
	CodeInternal     Code = "internal"        // 500: the gateway's log says more
)

var codeStatus = map[Code]int{
	CodeInvalid: http.StatusUnprocessableEntity, CodeMalformed: http.StatusBadRequest, CodeUnauthorized: http.StatusUnauthorized,
	CodeForbidden: http.StatusForbidden, CodeNotFound: http.StatusNotFound, CodeMethod: http.StatusMethodNotAllowed, CodeAmbiguous: http.StatusConflict,
	CodeNameInUse: http.StatusConflict, CodeExists: http.StatusConflict, CodeConflict: http.StatusConflict,
	CodeChanged: http.StatusPreconditionFailed, CodeTooLarge: http.StatusRequestEntityTooLarge, CodeLocked: http.StatusTooManyRequests,
	CodeBusy: http.StatusTooManyRequests, CodeFailed: http.StatusBadGateway,
	CodeUnsupported: http.StatusUnprocessableEntity, CodeUnavailable: http.StatusServiceUnavailable,
	CodeTimeout: http.StatusGatewayTimeout, CodeInternal: http.StatusInternalServerError,
}

// Status returns the HTTP status of a code.
func (c Code) Status() int {
	if s, ok := codeStatus[c]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// Problem is an RFC 9457 problem: the body of every answer that is not a
// success, and the error of every call of [Client].
type Problem struct {
	Type   string         `json:"type,omitempty"`
	Title  string         `json:"title"`
	Status int            `json:"status"`
	Detail string         `json:"detail"`
	Code   Code           `json:"code"`
	Errors []ProblemError `json:"errors,omitempty"`
}

// ProblemError is one fault of several. Location is file:line for manifests,
// else the name of the field or parameter.
type ProblemError struct {
	Location string `json:"location,omitempty"`
	Message  string `json:"message"`
}

// NewProblem makes a problem whose detail is for people.
func NewProblem(code Code, detail string, errs ...ProblemError) *Problem {
	return &Problem{Title: http.StatusText(code.Status()), Status: code.Status(), Detail: detail, Code: code, Errors: errs}
}

// Error gives one line, or one line for each of several faults.
func (p *Problem) Error() string {
	if len(p.Errors) == 0 {
		return p.Detail
	}
	lines := make([]string, len(p.Errors))
	for i, e := range p.Errors {
		lines[i] = e.Message
		if e.Location != "" {
			lines[i] = e.Location + ": " + e.Message
		}
	}
	return strings.Join(lines, "\n")
}

// GetStatus and ContentType make a Problem the error type of the server's
// REST library.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType is that of RFC 9457, section 3.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// Is reports whether err is a problem with one of the codes.
func Is(err error, codes ...Code) bool {
	var p *Problem
	if !errors.As(err, &p) {
		return false
	}
	for _, c := range codes {
		if p.Code == c {
			return true
		}
	}
	return false
}
