package sandbox

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	esys "github.com/tetratelabs/wazero/experimental/sys"
	"github.com/tetratelabs/wazero/sys"
)

// Where a module sees what it was granted.
const (
	inDir  = "/in"
	outDir = "/out"
)

// ValidName tells whether s can name an input or an output: 1 to 64 letters,
// digits, dots, dashes and underscores, and neither "." nor "..".
func ValidName(s string) bool {
	return s != "" && len(s) <= 64 && strings.Trim(s, ".") != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	})
}

// validPath tells whether s can be the path of a file in a folder that is an input: it
// has names as they are on the disks of owners, and says nothing but where the file is.
func validPath(s string) bool {
	return fs.ValidPath(s) && s != "." && len(s) <= maxPath && !strings.Contains(s, "\x00") && utf8.ValidString(s)
}

// folder is a directory of a module that holds exactly what was granted, and
// can be changed by nobody. A path is looked up as it stands: nothing in it is
// resolved, so nothing can lead out. The files were opened before the module ran;
// there is no file system behind it.
type folder struct {
	esys.UnimplementedFS
	inputs  map[string]*input        // by path
	below   map[string][]esys.Dirent // of inputs, by folder; "." is this one
	outputs []*output
}

func newFolder() *folder {
	return &folder{inputs: make(map[string]*input), below: map[string][]esys.Dirent{".": nil}}
}

// grant adds an input, or a folder of inputs if in is nil, and the folders above it.
func (d *folder) grant(at string, in *input) {
	d.enter(at, in == nil)
	if in != nil {
		d.inputs[at] = in
	} else if d.below[at] == nil {
		d.below[at] = []esys.Dirent{}
	}
}

// enter lists a path in the folder above it.
func (d *folder) enter(at string, isFolder bool) {
	above, name := path.Dir(at), path.Base(at)
	if _, ok := d.below[above]; !ok {
		d.below[above] = []esys.Dirent{}
		d.enter(above, true)
	}
	e := esys.Dirent{Name: name}
	if isFolder {
		e.Type = fs.ModeDir
	}
	d.below[above] = append(d.below[above], e)
}

// sort has folders list what is in them by name: in what order it was granted, the
// coordinator does not know when it runs a job again.
func (d *folder) sort() {
	for _, list := range d.below {
		slices.SortFunc(list, func(a, b esys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	}
}

// OpenFile implements [esys.FS].
func (d *folder) OpenFile(at string, flag esys.Oflag, _ fs.FileMode) (esys.File, esys.Errno) {
	const access = esys.O_RDONLY | esys.O_RDWR | esys.O_WRONLY
	writes := flag&access != esys.O_RDONLY
	at = relative(at)
	if _, ok := d.below[at]; ok {
		if writes {
			return nil, esys.EISDIR
		}
		return &listing{folder: d, at: at}, 0
	}
	if flag&esys.O_DIRECTORY != 0 {
		return nil, esys.ENOTDIR
	}
	if in := d.inputs[at]; in != nil {
		if writes || flag&esys.O_TRUNC != 0 {
			return nil, esys.EROFS
		}
		return &reading{input: in}, 0
	}
	if out := d.output(at); out != nil {
		switch {
		case !writes:
			return nil, esys.EACCES
		case flag&esys.O_TRUNC != 0 && out.size > 0, flag&esys.O_EXCL != 0 && out.opened:
			return nil, esys.EEXIST // what was written cannot be had back
		}
		out.opened = true
		return &writing{output: out}, 0
	}
	if flag&esys.O_CREAT != 0 {
		return nil, esys.EACCES
	}
	return nil, esys.ENOENT
}

// relative is path without what wazero puts before one that is meant from an
// opened folder.
func relative(path string) string {
	if path = strings.TrimPrefix(path, "/"); path == "" || path == "./" {
		return "."
	}
	return path
}

func (d *folder) output(name string) *output {
	if i := slices.IndexFunc(d.outputs, func(f *output) bool { return f.name == name }); i >= 0 {
		return d.outputs[i]
	}
	return nil
}

// Stat implements [esys.FS].
func (d *folder) Stat(at string) (sys.Stat_t, esys.Errno) {
	at = relative(at)
	if _, ok := d.below[at]; ok {
		return sys.Stat_t{Mode: fs.ModeDir | 0o500, Nlink: 1}, 0
	}
	if in := d.inputs[at]; in != nil {
		return in.stat(), 0
	}
	if out := d.output(at); out != nil {
		return out.stat(), 0
	}
	return sys.Stat_t{}, esys.ENOENT
}

// Lstat implements [esys.FS]: there are no links.
func (d *folder) Lstat(path string) (sys.Stat_t, esys.Errno) { return d.Stat(path) }

// position is an int64 by another name: go vet takes Seek of plain types for that
// of [io.Seeker], which returns another kind of error.
type position = int64

// listing is a [folder], or one in it, that was opened.
type listing struct {
	esys.UnimplementedFile
	*folder
	at   string
	next int
}

func (l *listing) IsAppend() bool                         { return false }
func (l *listing) SetAppend(bool) esys.Errno              { return esys.EISDIR }
func (l *listing) IsDir() (bool, esys.Errno)              { return true, 0 }
func (l *listing) Read([]byte) (int, esys.Errno)          { return 0, esys.EISDIR }
func (l *listing) Write([]byte) (int, esys.Errno)         { return 0, esys.EISDIR }
func (l *listing) Truncate(int64) esys.Errno              { return esys.EISDIR }
func (l *listing) Stat() (sys.Stat_t, esys.Errno)         { return l.folder.Stat(l.at) }
func (l *listing) Utimens(int64, int64) esys.Errno        { return esys.EROFS }
func (l *listing) Pread([]byte, int64) (int, esys.Errno)  { return 0, esys.EISDIR }
func (l *listing) Pwrite([]byte, int64) (int, esys.Errno) { return 0, esys.EISDIR }

// Seek implements [esys.File] as far as a directory is rewound.
func (l *listing) Seek(offset position, whence int) (int64, esys.Errno) {
	if offset != 0 || whence != io.SeekStart {
		return 0, esys.EINVAL
	}
	l.next = 0
	return 0, 0
}

// Readdir implements [esys.File].
func (l *listing) Readdir(n int) ([]esys.Dirent, esys.Errno) {
	all := slices.Clip(l.below[l.at])
	for _, out := range l.outputs {
		if out.opened {
			all = append(all, esys.Dirent{Name: out.name})
		}
	}
	all = all[min(l.next, len(all)):]
	if n >= 0 {
		all = all[:min(n, len(all))]
	}
	l.next += len(all)
	return all, 0
}

// input is a file that a module may read.
type input struct {
	size int64 // bytes
	file *os.File
}

// readAt reads like [io.ReaderAt], within the size that was granted, but how much
// is read does not depend on anything but that size.
func (in *input) readAt(p []byte, at int64) (int, esys.Errno) {
	if at < 0 {
		return 0, esys.EINVAL
	}
	p = p[:max(min(int64(len(p)), in.size-at), 0)]
	n, err := in.file.ReadAt(p, at)
	if err != nil && !(errors.Is(err, io.EOF) && n == len(p)) {
		return n, esys.EIO
	}
	return n, 0
}

// stat tells nothing but the size.
func (in *input) stat() sys.Stat_t { return sys.Stat_t{Mode: 0o400, Nlink: 1, Size: in.size} }

// reading is an [input] that was opened.
type reading struct {
	esys.UnimplementedFile
	*input
	at int64
}

func (r *reading) IsDir() (bool, esys.Errno)       { return false, 0 }
func (r *reading) Stat() (sys.Stat_t, esys.Errno)  { return r.stat(), 0 }
func (r *reading) Write([]byte) (int, esys.Errno)  { return 0, esys.EBADF }
func (r *reading) Truncate(int64) esys.Errno       { return esys.EROFS }
func (r *reading) Utimens(int64, int64) esys.Errno { return esys.EROFS }
func (r *reading) Sync() esys.Errno                { return 0 }
func (r *reading) Datasync() esys.Errno            { return 0 }

func (r *reading) Pwrite([]byte, int64) (int, esys.Errno)     { return 0, esys.EBADF }
func (r *reading) Pread(p []byte, at int64) (int, esys.Errno) { return r.readAt(p, at) }

// Read implements [esys.File].
func (r *reading) Read(p []byte) (int, esys.Errno) {
	n, errno := r.readAt(p, r.at)
	r.at += int64(n)
	return n, errno
}

// Seek implements [esys.File].
func (r *reading) Seek(offset position, whence int) (int64, esys.Errno) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += r.at
	case io.SeekEnd:
		offset += r.size
	default:
		return 0, esys.EINVAL
	}
	if offset < 0 {
		return 0, esys.EINVAL
	}
	r.at = offset
	return offset, 0
}

// output is what a module may write, and only at its end: it goes through a pipe
// to the parent, who counts.
type output struct {
	name   string
	pipe   *bufio.Writer
	size   int64 // bytes written
	opened bool
}

func newOutput(name string, pipe io.Writer) *output {
	return &output{name: name, pipe: bufio.NewWriterSize(pipe, 64<<10)}
}

func (o *output) stat() sys.Stat_t { return sys.Stat_t{Mode: 0o200, Nlink: 1, Size: o.size} }

// writing is an [output] that was opened.
type writing struct {
	esys.UnimplementedFile
	*output
}

func (w *writing) IsDir() (bool, esys.Errno)       { return false, 0 }
func (w *writing) IsAppend() bool                  { return true }
func (w *writing) SetAppend(bool) esys.Errno       { return 0 }
func (w *writing) Stat() (sys.Stat_t, esys.Errno)  { return w.stat(), 0 }
func (w *writing) Read([]byte) (int, esys.Errno)   { return 0, esys.EBADF }
func (w *writing) Utimens(int64, int64) esys.Errno { return 0 }
func (w *writing) Sync() esys.Errno                { return 0 }
func (w *writing) Datasync() esys.Errno            { return 0 }

func (w *writing) Pread([]byte, int64) (int, esys.Errno) { return 0, esys.EBADF }

// Write implements [esys.File].
func (w *writing) Write(p []byte) (int, esys.Errno) {
	n, err := w.pipe.Write(p)
	w.size += int64(n)
	if err != nil {
		return n, esys.EIO
	}
	return n, 0
}

// Pwrite implements [esys.File], at the end alone.
func (w *writing) Pwrite(p []byte, at int64) (int, esys.Errno) {
	if at != w.size {
		return 0, esys.EINVAL
	}
	return w.Write(p)
}

// Truncate implements [esys.File]: to what it is.
func (w *writing) Truncate(size int64) esys.Errno {
	if size != w.size {
		return esys.EINVAL
	}
	return 0
}

// Seek implements [esys.File]: to the end, which is where it is.
func (w *writing) Seek(offset position, whence int) (int64, esys.Errno) {
	if whence != io.SeekStart {
		offset += w.size
	}
	if offset != w.size {
		return 0, esys.EINVAL
	}
	return offset, 0
}
