# bash completion for shifter, shifterimg, shifterctl, setupRoot and unsetupRoot (loaded by bash-completion)

# The images that the user may use: the first column of "shifterimg images" without its head.
_shifter_images() {
    shifterimg images 2>/dev/null | while read -r name _; do
        [[ $name == *:* ]] && printf '%s\n' "$name"
    done
}

# Offer the words in $1 for $cur, of which readline replaces only what follows the last ":" or "=".
_shifter_offer() {
    local IFS=$'\n'
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
    __ltrim_colon_completions "$cur"
}

_shifter() {
    local cur prev words cword
    _get_comp_words_by_ref -n =: cur prev words cword

    # Options end at the first word that is none; what follows is a command with its own completion.
    local index word
    for ((index = 1; index < cword; index++)); do
        word=${words[index]}
        case $word in
            --)
                ((index++))
                break
                ;;
            --image | --volume | --module | --env | --env-file | -i | -V | -m | -e) ((index++)) ;;
            -?*) ;;
            *) break ;;
        esac
    done
    if ((index < cword)) || [[ $index -eq $cword && ${words[cword - 1]} == -- ]]; then
        local typed=${words[index]} start=0
        while [[ ${COMP_WORDS[start]} != "$typed" && $start -lt $COMP_CWORD ]]; do ((start++)); done
        _command_offset "$start"
        return
    fi

    case $cur in
        --image=*)
            cur=${cur#*=}
            _shifter_offer "$(_shifter_images)"
            return
            ;;
        --workdir=* | --env-file=* | --volume=* | --entrypoint=* | --entry=*)
            cur=${cur#*=}
            _filedir
            return
            ;;
    esac
    case $prev in
        -i | --image)
            _shifter_offer "$(_shifter_images)"
            return
            ;;
        -V | --volume | --env-file)
            _filedir
            return
            ;;
        -e | --env)
            compopt -o nospace
            COMPREPLY=($(compgen -S = -A export -- "$cur"))
            return
            ;;
        -m | --module)
            COMPREPLY=($(compgen -W none -- "$cur"))
            return
            ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W '-h --help --version -v --verbose -i --image= -V --volume= --entrypoint --entry
            -w --workdir -m --module= -e --env= --env-file= -E --clearenv' -- "$cur"))
        [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
        return
    fi
    COMPREPLY=($(compgen -A command -- "$cur"))
}

_shifterimg() {
    local cur prev words cword
    _get_comp_words_by_ref -n =: cur prev words cword
    case $prev in
        --format)
            COMPREPLY=($(compgen -W 'squashfs erofs' -- "$cur"))
            return
            ;;
        --user)
            COMPREPLY=($(compgen -A user -- "$cur"))
            return
            ;;
        --group)
            COMPREPLY=($(compgen -A group -- "$cur"))
            return
            ;;
    esac
    if ((cword == 1)); then
        COMPREPLY=($(compgen -W 'import images lookup inspect rm --help --version' -- "$cur"))
        return
    fi
    case ${words[1]} in
        import)
            if [[ $cur == -* ]]; then
                COMPREPLY=($(compgen -W '--format --user --group --help' -- "$cur"))
            elif ((cword == 2)); then
                _filedir
            else
                _shifter_offer "$(_shifter_images)"
            fi
            ;;
        images) COMPREPLY=($(compgen -W '--json --help' -- "$cur")) ;;
        lookup | inspect | rm)
            if [[ $cur == -* ]]; then
                COMPREPLY=($(compgen -W '--json --help' -- "$cur"))
            else
                _shifter_offer "$(_shifter_images)"
            fi
            ;;
    esac
}

_shifterctl() {
    local cur prev words cword
    _get_comp_words_by_ref -n =: cur prev words cword
    if ((cword == 1)); then
        COMPREPLY=($(compgen -W 'config doctor gc logs plan ps release udi-image --help --version' -- "$cur"))
        return
    fi
    case ${words[1]} in
        gc) COMPREPLY=($(compgen -W '--all --keep-images --help' -- "$cur")) ;;
        ps)
            if [[ $prev == --path ]]; then
                _filedir
            else
                COMPREPLY=($(compgen -W '--json --path --help' -- "$cur"))
            fi
            ;;
        logs) _shifter_job ;;
        plan) COMPREPLY=($(compgen -W '--json --' -- "$cur")) ;;
        doctor) COMPREPLY=($(compgen -W '--slurm --quiet --help' -- "$cur")) ;;
        udi-image) COMPREPLY=($(compgen -W '--json --help' -- "$cur")) ;;
        release) _filedir ;;
        config)
            if ((cword == 2)); then
                COMPREPLY=($(compgen -W 'check show --help' -- "$cur"))
            elif [[ $cur == -* ]]; then
                COMPREPLY=($(compgen -W '--json --help' -- "$cur"))
            else
                _filedir
            fi
            ;;
    esac
}

# A job of this node, which only root sees, after --job; else the options in $1 as well.
_shifter_job() {
    if [[ $prev == --job ]]; then
        COMPREPLY=($(compgen -W "$(ls /run/shifter/jobs 2>/dev/null)" -- "$cur"))
    else
        COMPREPLY=($(compgen -W "--job --help ${1-}" -- "$cur"))
    fi
}

_setupRoot() {
    local cur prev words cword
    _get_comp_words_by_ref -n =: cur prev words cword
    case $prev in
        -u | --user)
            COMPREPLY=($(compgen -A user -- "$cur"))
            return
            ;;
        -U | --uid)
            _uids
            return
            ;;
        -G | --gid)
            _gids
            return
            ;;
        -N | --node-spec)
            COMPREPLY=($(compgen -A hostname -S / -- "$cur"))
            compopt -o nospace
            return
            ;;
        -v | --volume | --nodes | --authorize | --from-json)
            _filedir
            return
            ;;
        -m | --module)
            COMPREPLY=($(compgen -W none -- "$cur"))
            return
            ;;
        --job)
            _shifter_job
            return
            ;;
        docker | custom | id)
            _shifter_offer "$(_shifter_images | sed -n "s/^$prev://p")"
            return
            ;;
        local)
            _filedir -d
            return
            ;;
        --restart | -s | --key) return ;;
    esac
    if [[ $cur == -* ]]; then
        _shifter_job '-h --version -u --user -U --uid -G --gid -v --volume -m --module -N --node-spec --nodes --restart
            --sshd --no-sshd -s --key --authorize --from-json -V --verbose --json'
        return
    fi
    COMPREPLY=($(compgen -W 'docker custom id local' -- "$cur"))
}

_unsetupRoot() {
    local cur prev words cword
    _get_comp_words_by_ref -n =: cur prev words cword
    _shifter_job '-h --version --json'
}

complete -F _shifter shifter
complete -F _shifterimg shifterimg
complete -F _shifterctl shifterctl
complete -F _setupRoot setupRoot
complete -F _unsetupRoot unsetupRoot
