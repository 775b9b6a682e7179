package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// monitor is a connection to QEMU's machine protocol (QMP): a JSON object a
// line, either way. Events are read and dropped: what matters of them is in the
// events file, for whoever looks.
type monitor struct {
	conn   net.Conn
	reader sync.WaitGroup

	mu      sync.Mutex
	last    int
	waiting map[int]chan reply
	err     error // why the connection ended
}

type command struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int    `json:"id"`
}

type reply struct {
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	lost error
}

// maxReply bounds one line of QEMU's: it runs what the guest makes of it.
const maxReply = 4 << 20

// newMonitor takes a connection over, and returns when QEMU takes commands:
// that is, when its machine is made.
func newMonitor(ctx context.Context, conn net.Conn) (*monitor, error) {
	m := &monitor{conn: conn, waiting: map[int]chan reply{}}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 4096), maxReply)
	greeted := lines.Scan()
	if !stop() {
		conn.Close()
		return nil, fmt.Errorf("wait for QEMU's monitor: %w", context.Cause(ctx))
	}
	if !greeted {
		conn.Close()
		return nil, fmt.Errorf("wait for QEMU's monitor: %w", ended(lines.Err()))
	}
	m.reader.Go(func() { m.read(lines) })
	if err := m.call(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func ended(err error) error {
	if err == nil {
		return errors.New("connection closed")
	}
	return err
}

func (m *monitor) read(lines *bufio.Scanner) {
	for lines.Scan() {
		var r reply
		if json.Unmarshal(lines.Bytes(), &r) != nil || r.ID == nil {
			continue // an event
		}
		m.mu.Lock()
		c := m.waiting[*r.ID]
		delete(m.waiting, *r.ID)
		m.mu.Unlock()
		if c != nil {
			c <- r
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = ended(lines.Err())
	for _, c := range m.waiting {
		c <- reply{lost: m.err}
	}
	clear(m.waiting)
}

// call sends a command and puts its answer into result, if that is not nil.
func (m *monitor) call(ctx context.Context, name string, arguments, result any) error {
	answer := make(chan reply, 1)
	m.mu.Lock()
	m.last++
	id, err := m.last, m.err
	if err == nil {
		m.waiting[id] = answer
	}
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("tell QEMU %s: %w", name, err)
	}
	if err := m.send(ctx, command{name, arguments, id}); err != nil {
		m.forget(id)
		return fmt.Errorf("tell QEMU %s: %w", name, err)
	}
	select {
	case r := <-answer:
		switch {
		case r.lost != nil:
			return fmt.Errorf("tell QEMU %s: %w", name, r.lost)
		case r.Error != nil:
			return fmt.Errorf("tell QEMU %s: %s", name, r.Error.Desc)
		case result == nil:
			return nil
		}
		return json.Unmarshal(r.Return, result)
	case <-ctx.Done():
		m.forget(id)
		return fmt.Errorf("tell QEMU %s: %w", name, context.Cause(ctx))
	}
}

// send writes a command with one call, which the connection keeps in one piece.
func (m *monitor) send(ctx context.Context, c command) error {
	line, err := json.Marshal(c)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { m.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			m.conn.SetWriteDeadline(time.Time{})
		}
	}()
	_, err = m.conn.Write(append(line, '\n'))
	return err
}

func (m *monitor) forget(id int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.waiting, id)
}

func (m *monitor) close() error {
	err := m.conn.Close()
	m.reader.Wait()
	return err
}
