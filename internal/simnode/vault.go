package simnode

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"sync"

	"sallyport/internal/atomicfile"
)

// vault is the small files of all nodes of a worker: keys, certificates,
// accepted revisions. The last record of a file counts.
type vault struct {
	log *appendLog

	mu    sync.Mutex
	files map[fileKey][]byte
}

type fileKey struct {
	node int
	name string
}

// fileRecord is one line of the log. Data nil: the file is gone.
type fileRecord struct {
	Node int    `json:"n"`
	Name string `json:"f"`
	Data []byte `json:"d"`
}

// openVault reads the log, and writes it anew when most of it is outdated.
func openVault(name string) (*vault, error) {
	v := &vault{files: map[fileKey][]byte{}}
	records := 0
	log, err := openLog(name, func(line []byte) error {
		var r fileRecord
		if err := json.Unmarshal(line, &r); err != nil {
			return err
		}
		records++
		v.set(r)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("nodes' files: %w", err)
	}
	v.log = log
	if records < 2*len(v.files)+1000 {
		return v, nil
	}
	if err := log.close(); err != nil {
		return nil, err
	}
	var all bytes.Buffer
	for k, data := range v.files {
		line, err := json.Marshal(fileRecord{k.node, k.name, data})
		if err != nil {
			return nil, err
		}
		all.Write(append(line, '\n'))
	}
	if err := atomicfile.Write(name, all.Bytes(), 0o600); err != nil {
		return nil, fmt.Errorf("nodes' files: %w", err)
	}
	v.log, err = openLog(name, func([]byte) error { return nil })
	return v, err
}

func (v *vault) set(r fileRecord) {
	k := fileKey{r.Node, r.Name}
	if r.Data == nil {
		delete(v.files, k)
		return
	}
	v.files[k] = r.Data
}

// write returns when the records are on disk.
func (v *vault) write(records ...fileRecord) error {
	var lines []byte
	for _, r := range records {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	v.mu.Lock()
	for _, r := range records {
		v.set(r)
	}
	at := v.log.append(lines)
	v.mu.Unlock()
	return v.log.sync(at)
}

func (v *vault) read(node int, name string) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.files[fileKey{node, name}]
}

// of is the part of one node, an [identity.Store].
func (v *vault) of(node int) shelf { return shelf{v, node} }

type shelf struct {
	v    *vault
	node int
}

func (s shelf) Read(name string) ([]byte, error) { return s.v.read(s.node, name), nil }

func (s shelf) Write(name string, data []byte, _ fs.FileMode) error {
	return s.v.write(fileRecord{s.node, name, data})
}

func (s shelf) Remove(name string) error {
	if s.v.read(s.node, name) == nil {
		return nil
	}
	return s.v.write(fileRecord{s.node, name, nil})
}

func (s shelf) Rename(from, to string) error {
	return s.v.write(fileRecord{s.node, to, s.v.read(s.node, from)}, fileRecord{s.node, from, nil})
}
